"""The tables of uploads and their parts. The bytes are objects under `uploads/{upload}/{part}`."""

from sqlalchemy import BigInteger, ForeignKey, Index, true
from sqlalchemy.orm import Mapped, mapped_column

from app.database import PlainText, Table
from app.spec.json_types import JsonObject


class Upload(Table):
    """A file that arrives in parts. Completing the upload makes the file."""

    __tablename__ = "uploads"
    __table_args__ = (Index("ix_uploads_status", "status", "expires_at"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[float]
    expires_at: Mapped[float]
    filename: Mapped[str] = mapped_column(PlainText)
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str]
    """`pending`, `completed`, `cancelled` or `expired`."""
    mapping: Mapped[JsonObject | None]
    """How the file's rows are read."""
    expires_after: Mapped[int | None]
    """Seconds until the file expires, from its creation."""
    file_id: Mapped[str | None]

    @property
    def prefix(self) -> str:
        return f"uploads/{self.id}"


class UploadPart(Table):
    """A part of an upload."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    created_at: Mapped[float]
    bytes: Mapped[int] = mapped_column(BigInteger)
    stored: Mapped[bool] = mapped_column(default=True, server_default=true())
    """Whether its bytes are all stored. Before, `bytes` is what may still come."""
