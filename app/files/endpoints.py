"""/v1/files"""

from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from app.dependencies import ServicesDependency
from app.files.multipart import UploadForm
from app.files.schemas import FileDeleted, FileObject, Purpose
from app.files.service import MAX_BYTES
from app.keys.middleware import CallerDependency
from app.pagination import After, Page, page

router = APIRouter(prefix="/files", tags=["files"])

UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=UPLOAD_BODY)
async def create_file(request: Request, caller: CallerDependency, services: ServicesDependency) -> FileObject:
    """Upload a dataset. It streams to the object store; the service never holds it whole."""
    return FileObject.of(await services.files.upload(caller.project, UploadForm(request, MAX_BYTES)))


@router.get("")
def list_files(
    caller: CallerDependency,
    services: ServicesDependency,
    purpose: Purpose | None = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """The files of the caller's project."""
    found = services.files.page(caller.project, purpose=purpose, after=after, limit=limit, ascending=order == "asc")
    return page([FileObject.of(file) for file in found], limit)


@router.get("/{file_id}")
def get_file(file_id: str, caller: CallerDependency, services: ServicesDependency) -> FileObject:
    """One file's description."""
    return FileObject.of(services.files.get(caller.project, file_id))


@router.get(
    "/{file_id}/content",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def get_file_content(file_id: str, caller: CallerDependency, services: ServicesDependency) -> StreamingResponse:
    """The file's bytes."""
    file, chunks = services.files.content(caller.project, file_id)
    headers = {
        "Content-Length": str(file.bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
    }
    return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}")
def delete_file(file_id: str, caller: CallerDependency, services: ServicesDependency) -> FileDeleted:
    """Delete a file. Jobs that already use it keep their copy until they end."""
    services.files.delete(caller.project, file_id)
    return FileDeleted(id=file_id)
