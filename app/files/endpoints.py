"""/v1/files"""

from typing import Annotated, Literal, get_args
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.dependencies import ServicesDependency
from app.exception_handlers import ErrorResponse
from app.files.multipart import UploadForm, form_schema
from app.files.ranges import requested
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
    sha256: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$", description="Only files with this content.")] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """The files of the caller's project."""
    files = services.files.page(
        caller.project, purpose=purpose, sha256=sha256, after=after, limit=limit, ascending=order == "asc"
    )
    return page([FileObject.of(file) for file in files], limit)


@router.get("/{file_id}")
def get_file(file_id: str, caller: CallerDependency, services: ServicesDependency) -> FileObject:
    """The description of a file."""
    return FileObject.of(services.files.get(caller.project, file_id))


@router.get(
    "/{file_id}/content",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"content": {"application/octet-stream": {}}, "description": "The part that `Range` asks for"},
        416: {"model": ErrorResponse, "description": "The range begins after the file's end"},
    },
)
@router.head("/{file_id}/content", include_in_schema=False)
def get_file_content(
    request: Request,
    file_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    range: Annotated[str | None, Header(description="The part to send, such as `bytes=1000-`.")] = None,
    if_range: Annotated[str | None, Header(description="Send the part only if this is the file's `ETag`.")] = None,
) -> Response:
    """The file's bytes, or a part of them. HEAD gives the headers alone."""
    file = services.files.get(caller.project, file_id)
    tag = f'"{file.id}"'  # the bytes of a file never change
    part = requested(range, file.bytes) if if_range in (None, tag) else None
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "Content-Length": str(part.end - part.start if part else file.bytes),
        "ETag": tag,
    }
    if part is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{file.bytes}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, media_type="application/octet-stream", headers=headers)
    content = services.files.content(file, part)
    return StreamingResponse(content, status_code=status, media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}")
def delete_file(file_id: str, caller: CallerDependency, services: ServicesDependency) -> FileDeleted:
    """Delete a file. Jobs that already use it keep their copy until they end."""
    services.files.delete(caller.project, file_id)
    return FileDeleted(id=file_id)
