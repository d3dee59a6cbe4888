"""The API schemas of uploads."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.files.schemas import EXAMPLE as FILE
from app.files.schemas import ExpiresAfter, FileObject, UploadPurpose
from app.files.service import MAX_FILE_BYTES
from app.spec.datasets.mapping import Mapping
from app.spec.schema_base import Strict
from app.uploads.tables import Upload, UploadPart


class UploadSpec(Strict):
    """The body of `POST /v1/uploads`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "filename": "preferences.jsonl",
                "purpose": "fine-tune",
                "bytes": 2147483648,
                "mime_type": "text/jsonl",
            }
        }
    )

    filename: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    purpose: UploadPurpose
    bytes: Annotated[int, Field(ge=1, le=MAX_FILE_BYTES)]
    """Total size of all parts, in bytes."""
    mime_type: Annotated[str, StringConstraints(max_length=255)]
    expires_after: ExpiresAfter | None = None
    mapping: Mapping | None = None
    """How the rows are read, if their column names do not say it."""


class UploadCompletion(Strict):
    """The body of `POST /v1/uploads/{id}/complete`."""

    model_config = ConfigDict(json_schema_extra={"example": {"part_ids": ["part-abc123", "part-def456"]}})

    part_ids: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    """The ids of the parts, in order."""
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{32}$")] | None = None
    """MD5 of the whole file, in hex. The request is refused if it does not match."""


class UploadObject(BaseModel):
    """OpenAI's `upload` object."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "upload-abc123",
                "object": "upload",
                "bytes": 120000,
                "created_at": 1730000000,
                "expires_at": 1730003600,
                "filename": "preferences.jsonl",
                "purpose": "fine-tune",
                "status": "completed",
                "file": FILE,
            }
        }
    )

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: UploadPurpose
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None

    @classmethod
    def of(cls, upload: Upload, file: FileObject | None = None) -> "UploadObject":
        return cls(
            id=upload.id,
            bytes=upload.bytes,
            created_at=int(upload.created_at),
            expires_at=int(upload.expires_at),
            filename=upload.filename,
            purpose=upload.purpose,
            status=upload.status,
            file=file,
        )


class PartObject(BaseModel):
    """OpenAI's `upload.part` object."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "part-abc123",
                "object": "upload.part",
                "created_at": 1730000000,
                "upload_id": "upload-abc123",
            }
        }
    )

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str

    @classmethod
    def of(cls, part: UploadPart) -> "PartObject":
        return cls(id=part.id, created_at=int(part.created_at), upload_id=part.upload_id)
