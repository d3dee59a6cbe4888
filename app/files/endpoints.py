"""/v1/files"""

from typing import Annotated, Literal, get_args
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.dependencies import ServicesDependency
from app.files.multipart import UploadForm, form_schema
from app.files.schemas import FileDeleted, FileObject, Purpose, UploadPurpose
from app.files.service import MAX_FILE_BYTES
from app.idempotency.service import RequestIdentityDependency
from app.keys.access import access
from app.keys.middleware import CallerDependency
from app.pagination import After, Page, page

router = APIRouter(prefix="/files", tags=["files"])

BODY = form_schema(
    {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(get_args(UploadPurpose))},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
        "mapping": {"type": "string", "contentMediaType": "application/json"},
    },
    ["file", "purpose"],
)


@router.post("", openapi_extra=BODY)
@access(streams_body=True)
async def create_file(
    request: Request, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> FileObject:
    """Upload a dataset. It streams to the object store; the service never holds the whole file."""
    file = await services.files.upload(caller.project, UploadForm(request, MAX_FILE_BYTES), identity)
    file_object = FileObject.of(file)
    await run_in_threadpool(services.reports.begin, caller.project, file_object)
    return file_object


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
    files = services.files.page(caller.project, purpose=purpose, after=after, limit=limit, ascending=order == "asc")
    return page([FileObject.of(file) for file in files], limit)


@router.get("/{file_id}")
def get_file(file_id: str, caller: CallerDependency, services: ServicesDependency) -> FileObject:
    """The description of a file."""
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
