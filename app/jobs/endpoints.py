"""/v1/fine_tuning/jobs"""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app.dependencies import ServicesDependency
from app.idempotency.service import RequestIdentityDependency
from app.jobs.schemas import CheckpointObject, EventObject, JobObject, MetricSeries, StreamToken
from app.keys.access import access
from app.keys.middleware import CallerDependency
from app.keys.schemas import Scope
from app.pagination import After, Page, page
from app.query_parameters import MetadataFilter
from app.spec.job import JobSpec

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"])


@router.post("")
def create_job(
    spec: JobSpec, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> JobObject:
    """Start a job. The service checks its files and queues it; then a GPU worker trains."""
    return services.jobs.create(caller.project, spec, identity)


@router.get("")
def list_jobs(
    caller: CallerDependency,
    services: ServicesDependency,
    metadata: MetadataFilter,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[JobObject]:
    """Jobs, newest first."""
    return page(services.jobs.page(caller.project, after=after, limit=limit, metadata=metadata), limit)


@router.get("/{job_id}")
def get_job(job_id: str, caller: CallerDependency, services: ServicesDependency) -> JobObject:
    """One job."""
    return services.jobs.get(caller.project, job_id)


@router.post("/{job_id}/cancel")
def cancel_job(
    job_id: str, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> JobObject:
    """Cancel a job that has not ended. Its GPU is free within seconds; its checkpoints stay."""
    return services.jobs.cancel(caller.project, job_id, identity)


@router.post("/{job_id}/pause")
def pause_job(job_id: str, caller: CallerDependency, services: ServicesDependency) -> JobObject:
    """Pause a job. A running job writes a checkpoint; then it is `queued` with `paused` true."""
    return services.jobs.pause(caller.project, job_id)


@router.post("/{job_id}/resume")
def resume_job(job_id: str, caller: CallerDependency, services: ServicesDependency) -> JobObject:
    """Resume a paused job where it stopped. It ends with the same bytes as without the pause."""
    return services.jobs.resume(caller.project, job_id)


@router.get("/{job_id}/events")
def list_events(
    job_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Page[EventObject]:
    """The events of a job, newest first."""
    return page(services.jobs.events(caller.project, job_id, after=after, limit=limit), limit)


@router.get("/{job_id}/metrics")
def get_metrics(
    job_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    names: Annotated[
        list[str] | None, Query(max_length=64, description="Return only this metric; repeat for several.")
    ] = None,
    points: Annotated[
        int, Query(ge=3, le=10_000, description="Maximum points of each series. The series keeps its shape.")
    ] = 1000,
) -> MetricSeries:
    """The metrics of a job, each as a series by step."""
    return services.jobs.metrics(caller.project, job_id, names, points)


@router.post("/{job_id}/stream_token")
@access(scope=Scope.READ)
def create_stream_token(
    request: Request, job_id: str, caller: CallerDependency, services: ServicesDependency
) -> StreamToken:
    """Create a token that opens this job's stream within one minute. Browsers need it: EventSource sends no key."""
    return services.jobs.stream_token(caller, job_id, request.scope["root_path"])


def _last_sequence(
    job_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    last_event_id: Annotated[
        str | None, Header(description="The id of the last event that the client received.")
    ] = None,
) -> int:
    """The event number after which a stream begins. A bad request fails here, before the stream starts."""
    return services.jobs.last_sequence(caller, job_id, last_event_id)


@router.get("/{job_id}/stream", response_class=EventSourceResponse)
@access(stream_token=True)
async def stream_job(
    job_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    last_sequence: Annotated[int, Depends(_last_sequence)],
    token: Annotated[str | None, Query(description="Replaces the API key: see stream_token.")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events until the job ends: `message` and `metrics` (its events) and `job` (its state)."""
    async for event in services.jobs.stream(caller, job_id, last_sequence):
        yield event


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> Page[CheckpointObject]:
    """The checkpoints of a job, latest step first. Each is a model that you can download or train further."""
    return page(services.jobs.checkpoints(caller.project, job_id, after=after, limit=limit), limit)


@router.get("/{job_id}/logs", response_class=StreamingResponse, responses={200: {"content": {"text/plain": {}}}})
def get_logs(job_id: str, caller: CallerDependency, services: ServicesDependency) -> StreamingResponse:
    """The trainer's log of the latest attempt that has one."""
    return StreamingResponse(services.jobs.logs(caller.project, job_id), media_type="text/plain; charset=utf-8")
