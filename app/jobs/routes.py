"""The routes that evaluations and labellings share: list, get, follow, pause, resume, cancel, and read the results."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from app.archive import tar_response
from app.dependencies import ServicesDependency
from app.idempotency.service import RequestIdentityDependency
from app.jobs.kinds import JobKind
from app.jobs.result_files import ResultFiles
from app.jobs.schemas import EventObject, StreamToken
from app.keys.access import access
from app.keys.middleware import CallerDependency
from app.keys.schemas import Scope
from app.pagination import After, Page, page
from app.query_parameters import MetadataFilter
from app.services import Services


def add_routes(
    router: APIRouter, kind: JobKind, shown: type[BaseModel], service: Callable[[Services], ResultFiles[Any]]
) -> None:
    """Add the routes of the jobs of `kind` to `router`. `shown` is their API object, and `service` serves them."""
    noun, path = kind.noun, f"/{{{kind.noun}_id}}"
    a_noun = f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
    # In the path it is called evaluation_id, labelling_id and so on.
    JobId = Annotated[str, Path(alias=f"{noun}_id")]  # noqa: N806 - a type

    page_of: Any = Page[shown]  # type: ignore[valid-type]

    def content(media_type: str) -> dict[int | str, dict[str, Any]]:
        return {200: {"content": {media_type: {}}}}

    @router.get(
        "",
        response_model=page_of,
        name=f"list_{noun}s",
        description=f"{noun.capitalize()}s, newest first.",
    )
    def list_jobs(
        caller: CallerDependency,
        services: ServicesDependency,
        metadata: MetadataFilter,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Page[Any]:
        return page(service(services).page(caller.project, after=after, limit=limit, metadata=metadata), limit)

    @router.get(path, response_model=shown, name=f"get_{noun}", description=f"One {noun}.")
    def get_job(job_id: JobId, caller: CallerDependency, services: ServicesDependency) -> Any:
        return service(services).get(caller.project, job_id)

    @router.post(
        f"{path}/cancel",
        response_model=shown,
        name=f"cancel_{noun}",
        description=f"Cancel {a_noun} that has not ended. Its GPU is free within seconds.",
    )
    def cancel_job(
        job_id: JobId, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
    ) -> Any:
        return service(services).cancel(caller.project, job_id, identity)

    @router.post(
        f"{path}/pause",
        response_model=shown,
        name=f"pause_{noun}",
        description=f"Pause {a_noun}. A running one keeps the completions that it has sampled.",
    )
    def pause_job(job_id: JobId, caller: CallerDependency, services: ServicesDependency) -> Any:
        return service(services).pause(caller.project, job_id)

    @router.post(
        f"{path}/resume",
        response_model=shown,
        name=f"resume_{noun}",
        description=f"Resume a paused {noun} where it stopped.",
    )
    def resume_job(job_id: JobId, caller: CallerDependency, services: ServicesDependency) -> Any:
        return service(services).resume(caller.project, job_id)

    @router.get(f"{path}/events", name=f"list_{noun}_events", description=f"The events of {a_noun}, newest first.")
    def list_events(
        job_id: JobId,
        caller: CallerDependency,
        services: ServicesDependency,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    ) -> Page[EventObject]:
        return page(service(services).events(caller.project, job_id, after=after, limit=limit), limit)

    @router.post(
        f"{path}/stream_token",
        name=f"create_{noun}_stream_token",
        description=f"Create a token that opens this {noun}'s stream within one minute.\n\n"
        "Browsers need it: EventSource sends no key.",
    )
    @access(scope=Scope.READ)
    def create_stream_token(
        request: Request, job_id: JobId, caller: CallerDependency, services: ServicesDependency
    ) -> StreamToken:
        return service(services).stream_token(caller, job_id, request.scope["root_path"])

    def last_sequence(
        job_id: JobId,
        caller: CallerDependency,
        services: ServicesDependency,
        last_event_id: Annotated[
            str | None, Header(description="The id of the last event that the client received.")
        ] = None,
    ) -> int:
        """The event number after which a stream begins. A bad request fails here, before the stream starts."""
        return service(services).last_sequence(caller, job_id, last_event_id)

    @router.get(
        f"{path}/stream",
        response_class=EventSourceResponse,
        name=f"stream_{noun}",
        description=f"Server-sent events until the {noun} ends: `message` (its events) and `{noun}` (its state).",
    )
    @access(stream_token=True)
    async def stream_job(
        job_id: JobId,
        caller: CallerDependency,
        services: ServicesDependency,
        sequence: Annotated[int, Depends(last_sequence)],
        token: Annotated[str | None, Query(description="Replaces the API key: see stream_token.")] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        async for event in service(services).stream(caller, job_id, sequence):
            yield event

    @router.get(
        f"{path}/report",
        response_class=StreamingResponse,
        responses=content("application/json"),
        name=f"get_{noun}_report",
        description=f"All figures of a succeeded {noun}, with their errors.",
    )
    def get_report(job_id: JobId, caller: CallerDependency, services: ServicesDependency) -> StreamingResponse:
        return StreamingResponse(service(services).report(caller.project, job_id), media_type="application/json")

    @router.get(
        f"{path}/download",
        response_class=StreamingResponse,
        responses=content("application/x-tar"),
        name=f"download_{noun}",
        description=f"The results of {a_noun} as a tar file: `{noun}.json`, `report.json` and its other files.",
    )
    def download_results(job_id: JobId, caller: CallerDependency, services: ServicesDependency) -> StreamingResponse:
        return tar_response(service(services).download(caller.project, job_id), job_id)

    @router.get(
        f"{path}/logs",
        response_class=StreamingResponse,
        responses=content("text/plain"),
        name=f"get_{noun}_logs",
        description="The log of the latest attempt that has one.",
    )
    def get_logs(job_id: JobId, caller: CallerDependency, services: ServicesDependency) -> StreamingResponse:
        log = service(services).logs(caller.project, job_id)
        return StreamingResponse(log, media_type="text/plain; charset=utf-8")
