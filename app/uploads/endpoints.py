"""/v1/uploads"""

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from app.dependencies import ServicesDependency
from app.files.multipart import UploadForm, form_schema
from app.idempotency.service import RequestIdentityDependency
from app.keys.access import access
from app.keys.middleware import CallerDependency
from app.uploads.schemas import PartObject, UploadCompletion, UploadObject, UploadSpec
from app.uploads.service import MAX_PART_BYTES

router = APIRouter(prefix="/uploads", tags=["uploads"])


@router.post("")
def create_upload(
    spec: UploadSpec, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> UploadObject:
    """Begin an upload of up to 8 GB. Send its parts and complete it within an hour."""
    return services.uploads.create(caller.project, spec, identity)


@router.post(
    "/{upload_id}/parts", openapi_extra=form_schema({"data": {"type": "string", "format": "binary"}}, ["data"])
)
@access(streams_body=True)
async def add_upload_part(
    upload_id: str,
    request: Request,
    caller: CallerDependency,
    services: ServicesDependency,
    identity: RequestIdentityDependency,
) -> PartObject:
    """Send a part of up to 64 MB. Parts may come in parallel and in any order."""
    form = UploadForm(request, MAX_PART_BYTES, name="data")
    return await services.uploads.add_part(caller.project, upload_id, form, identity)


@router.post("/{upload_id}/complete")
async def complete_upload(
    upload_id: str, completion: UploadCompletion, caller: CallerDependency, services: ServicesDependency
) -> UploadObject:
    """Join the parts into a file, in the given order."""
    upload = await services.uploads.complete(caller.project, upload_id, completion)
    if upload.file is not None:
        await run_in_threadpool(services.reports.begin, caller.project, upload.file)
    return upload


@router.post("/{upload_id}/cancel")
def cancel_upload(upload_id: str, caller: CallerDependency, services: ServicesDependency) -> UploadObject:
    """Cancel an upload and delete its parts."""
    return services.uploads.cancel(caller.project, upload_id)
