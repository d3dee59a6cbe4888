"""The table of API keys."""

from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table


class ApiKey(Table):
    """A key that was handed out. The key itself is not here: only its HMAC is."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    project: Mapped[str]
    scopes: Mapped[list[str]]
    digest: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    last_used_at: Mapped[float | None]
    """To the minute."""
    revoked_at: Mapped[float | None]
