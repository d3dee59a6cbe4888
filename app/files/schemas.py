"""Files on the wire."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.files.tables import File

Purpose = Literal["fine-tune", "fine-tune-results"]


class FileObject(BaseModel):
    """OpenAI's `file` object."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "file-abc123",
                "object": "file",
                "bytes": 120000,
                "created_at": 1730000000,
                "filename": "preferences.jsonl",
                "purpose": "fine-tune",
                "status": "processed",
                "status_details": None,
                "expires_at": None,
            }
        }
    )

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None

    @classmethod
    def of(cls, file: File) -> "FileObject":
        return cls(
            id=file.id,
            bytes=file.bytes,
            created_at=int(file.created_at),
            filename=file.filename,
            purpose=file.purpose,
        )


class FileDeleted(BaseModel):
    """Answer to a DELETE."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True
