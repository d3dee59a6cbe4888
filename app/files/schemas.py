"""The API schemas of files."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from app.files.tables import File
from app.spec.json_types import JsonObject
from app.spec.schema_base import Strict, unix_seconds

UploadPurpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
"""Training takes files with the purpose `fine-tune`. Evaluations also take `evals`."""
Purpose = Literal[UploadPurpose, "assistants_output", "batch_output", "fine-tune-results"]
EXAMPLE: dict[str, JsonValue] = {
    "id": "file-abc123",
    "object": "file",
    "bytes": 120000,
    "created_at": 1730000000,
    "filename": "preferences.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
    "status_details": None,
    "expires_at": None,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "mapping": None,
}


class ExpiresAfter(Strict):
    """When a file is deleted automatically."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


class FileObject(BaseModel):
    """OpenAI's `file` object."""

    model_config = ConfigDict(json_schema_extra={"example": EXAMPLE})

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None
    sha256: str | None = None
    """The SHA-256 of an uploaded file, in hexadecimal digits."""
    mapping: JsonObject | None = None
    """The mapping that it was uploaded with."""

    @classmethod
    def of(cls, file: File) -> "FileObject":
        return cls(
            id=file.id,
            bytes=file.bytes,
            created_at=int(file.created_at),
            filename=file.filename,
            purpose=file.purpose,
            expires_at=unix_seconds(file.expires_at),
            sha256=file.sha256 or None,
            mapping=file.mapping,
        )


class FileDeleted(BaseModel):
    """Answer to a DELETE."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True
