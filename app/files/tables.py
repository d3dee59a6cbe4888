"""The table of files; their bytes are objects under `files/{id}`."""

from sqlalchemy import BigInteger, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.database import PlainText, Table, index_where
from app.spec.json_types import JsonObject


class File(Table):
    """A file. A deleted file keeps its row and its object while an active job still needs it."""

    __tablename__ = "files"
    __table_args__ = (
        Index("ix_files_project_created_at", "project", "created_at", "id"),
        index_where("ix_files_expires_at", "expires_at", where="deleted_at IS NULL AND expires_at IS NOT NULL"),
        index_where("ix_files_deleted_at", "deleted_at", where="deleted_at IS NOT NULL"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    filename: Mapped[str] = mapped_column(PlainText)
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    created_at: Mapped[float]
    mapping: Mapped[JsonObject | None]
    """How its rows are read, if the uploader gave a mapping."""
    expires_at: Mapped[float | None]
    deleted_at: Mapped[float | None]

    @property
    def key(self) -> str:
        """The key of the bytes in the object store."""
        return f"files/{self.id}"
