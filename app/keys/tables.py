"""The table of API keys."""

from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table


class ApiKey(Table):
    """An API key. The secret itself is not stored, only its HMAC."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    project: Mapped[str]
    scopes: Mapped[list[str]]
    digest: Mapped[str] = mapped_column(unique=True)
    signed_by: Mapped[str | None]
    """The fingerprint of the key of `DPO_SECRET_KEY` under which `digest` is; None if that is not known."""
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    last_used_at: Mapped[float | None]
    """Accurate to a minute."""
    revoked_at: Mapped[float | None]
