"""/v1/fine_tuning/jobs"""

import re
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from app.dependencies import ServicesDependency
from app.jobs.schemas import CheckpointObject, EventObject, JobObject
from app.jobs.spec import JobSpec
from app.keys.middleware import CallerDependency
from app.pagination import After, Page, page

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"])

METADATA = re.compile(r"metadata\[(.{1,64})\]")


@router.post("")
def create_job(spec: JobSpec, caller: CallerDependency, services: ServicesDependency) -> JobObject:
    """Start a job: its files are checked, it waits in the queue, and a GPU worker trains."""
    return services.jobs.create(caller.project, spec)


@router.get("")
def list_jobs(
    request: Request,
    caller: CallerDependency,
    services: ServicesDependency,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[JobObject]:
    """Jobs, newest first. `metadata[key]=value` keeps those whose metadata hold the pair."""
    pairs = request.query_params.items()
    metadata = {match[1]: value for name, value in pairs if (match := METADATA.fullmatch(name))}
    found = services.jobs.page(caller.project, after=after, limit=limit, metadata=metadata)
    return page(found, limit)


@router.get("/{job_id}")
def get_job(job_id: str, caller: CallerDependency, services: ServicesDependency) -> JobObject:
    """One job."""
    return services.jobs.get(caller.project, job_id)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, caller: CallerDependency, services: ServicesDependency) -> JobObject:
    """Cancel a job that has not ended. Its checkpoints stay."""
    return services.jobs.cancel(caller.project, job_id)


@router.get("/{job_id}/events")
def list_events(
    job_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Page[EventObject]:
    """What happened to a job, newest first."""
    return page(services.jobs.events(caller.project, job_id, after=after, limit=limit), limit)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> Page[CheckpointObject]:
    """The checkpoints of a job, latest first. Each is a model to download or to train on."""
    return page(services.jobs.checkpoints(caller.project, job_id, after=after, limit=limit), limit)


@router.get("/{job_id}/logs", response_class=StreamingResponse, responses={200: {"content": {"text/plain": {}}}})
def get_logs(job_id: str, caller: CallerDependency, services: ServicesDependency) -> StreamingResponse:
    """The trainer's log of the latest attempt."""
    return StreamingResponse(services.jobs.logs(caller.project, job_id), media_type="text/plain; charset=utf-8")
