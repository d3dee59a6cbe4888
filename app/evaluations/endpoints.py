"""/v1/evaluations"""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app.archive import tar_response
from app.dependencies import ServicesDependency
from app.evaluations.schemas import EvaluationObject
from app.idempotency.service import RequestIdentityDependency
from app.jobs.schemas import EventObject, StreamToken
from app.keys.access import access
from app.keys.middleware import CallerDependency
from app.keys.schemas import Scope
from app.pagination import After, Page, page
from app.query_parameters import MetadataFilter
from app.spec.evaluation import EvaluationSpec

router = APIRouter(prefix="/evaluations", tags=["evaluations"])


@router.post("")
def create_evaluation(
    spec: EvaluationSpec, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> EvaluationObject:
    """Start an evaluation. The service checks its files and queues it; then a GPU worker runs it."""
    return services.evaluations.create(caller.project, spec, identity)


@router.get("")
def list_evaluations(
    caller: CallerDependency,
    services: ServicesDependency,
    metadata: MetadataFilter,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[EvaluationObject]:
    """Evaluations, newest first."""
    return page(services.evaluations.page(caller.project, after=after, limit=limit, metadata=metadata), limit)


@router.get("/{evaluation_id}")
def get_evaluation(evaluation_id: str, caller: CallerDependency, services: ServicesDependency) -> EvaluationObject:
    """One evaluation."""
    return services.evaluations.get(caller.project, evaluation_id)


@router.post("/{evaluation_id}/cancel")
def cancel_evaluation(
    evaluation_id: str, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> EvaluationObject:
    """Cancel an evaluation that has not ended. Its GPU is free within seconds."""
    return services.evaluations.cancel(caller.project, evaluation_id, identity)


@router.post("/{evaluation_id}/pause")
def pause_evaluation(evaluation_id: str, caller: CallerDependency, services: ServicesDependency) -> EvaluationObject:
    """Pause an evaluation. A running one keeps the completions that it has sampled."""
    return services.evaluations.pause(caller.project, evaluation_id)


@router.post("/{evaluation_id}/resume")
def resume_evaluation(evaluation_id: str, caller: CallerDependency, services: ServicesDependency) -> EvaluationObject:
    """Resume a paused evaluation where it stopped."""
    return services.evaluations.resume(caller.project, evaluation_id)


@router.get("/{evaluation_id}/events")
def list_evaluation_events(
    evaluation_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Page[EventObject]:
    """The events of an evaluation, newest first."""
    return page(services.evaluations.events(caller.project, evaluation_id, after=after, limit=limit), limit)


@router.post("/{evaluation_id}/stream_token")
@access(scope=Scope.READ)
def create_evaluation_stream_token(
    request: Request, evaluation_id: str, caller: CallerDependency, services: ServicesDependency
) -> StreamToken:
    """Create a token that opens this evaluation's stream within one minute.

    Browsers need it: EventSource sends no key.
    """
    return services.evaluations.stream_token(caller, evaluation_id, request.scope["root_path"])


def _last_sequence(
    evaluation_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    last_event_id: Annotated[
        str | None, Header(description="The id of the last event that the client received.")
    ] = None,
) -> int:
    """The event number after which a stream begins. A bad request fails here, before the stream starts."""
    return services.evaluations.last_sequence(caller, evaluation_id, last_event_id)


@router.get("/{evaluation_id}/stream", response_class=EventSourceResponse)
@access(stream_token=True)
async def stream_evaluation(
    evaluation_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    last_sequence: Annotated[int, Depends(_last_sequence)],
    token: Annotated[str | None, Query(description="Replaces the API key: see stream_token.")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events until the evaluation ends: `message` (its events) and `evaluation` (its state)."""
    async for event in services.evaluations.stream(caller, evaluation_id, last_sequence):
        yield event


@router.get(
    "/{evaluation_id}/report", response_class=StreamingResponse, responses={200: {"content": {"application/json": {}}}}
)
def get_evaluation_report(
    evaluation_id: str, caller: CallerDependency, services: ServicesDependency
) -> StreamingResponse:
    """All metrics of a succeeded evaluation, with their errors, by temperature and by length."""
    report = services.evaluations.report(caller.project, evaluation_id)
    return StreamingResponse(report, media_type="application/json")


@router.get(
    "/{evaluation_id}/download",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-tar": {}}}},
)
def download_evaluation(
    evaluation_id: str, caller: CallerDependency, services: ServicesDependency
) -> StreamingResponse:
    """The results of an evaluation as a tar file: `evaluation.json`, `report.json` and `items.jsonl`."""
    archive = services.evaluations.download(caller.project, evaluation_id)
    return tar_response(archive, evaluation_id)


@router.get("/{evaluation_id}/logs", response_class=StreamingResponse, responses={200: {"content": {"text/plain": {}}}})
def get_evaluation_logs(
    evaluation_id: str, caller: CallerDependency, services: ServicesDependency
) -> StreamingResponse:
    """The log of the latest attempt that has one."""
    log = services.evaluations.logs(caller.project, evaluation_id)
    return StreamingResponse(log, media_type="text/plain; charset=utf-8")
