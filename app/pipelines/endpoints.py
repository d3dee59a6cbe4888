"""/v1/pipelines"""

from typing import Annotated

from fastapi import APIRouter, Query

from app.dependencies import ServicesDependency
from app.idempotency.service import RequestIdentityDependency
from app.keys.middleware import CallerDependency
from app.pagination import After, Page, page
from app.pipelines.schemas import PipelineObject
from app.spec.pipeline import PipelineSpec

router = APIRouter(prefix="/pipelines", tags=["pipelines"])


@router.post("")
def create_pipeline(
    spec: PipelineSpec, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> PipelineObject:
    """Start a pipeline. Its first stages begin at once, and the others when their inputs are there."""
    return services.pipelines.create(caller.project, spec, identity)


@router.get("")
def list_pipelines(
    caller: CallerDependency,
    services: ServicesDependency,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=20)] = 20,
) -> Page[PipelineObject]:
    """Pipelines, newest first."""
    return page(services.pipelines.page(caller.project, after=after, limit=limit), limit)


@router.get("/{pipeline_id}")
def get_pipeline(pipeline_id: str, caller: CallerDependency, services: ServicesDependency) -> PipelineObject:
    """One pipeline: its stages in each round, and its result."""
    return services.pipelines.get(caller.project, pipeline_id)


@router.post("/{pipeline_id}/cancel")
def cancel_pipeline(
    pipeline_id: str, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> PipelineObject:
    """Cancel a pipeline and its unfinished jobs."""
    return services.pipelines.cancel(caller.project, pipeline_id, identity)


@router.post("/{pipeline_id}/pause")
def pause_pipeline(pipeline_id: str, caller: CallerDependency, services: ServicesDependency) -> PipelineObject:
    """Pause a pipeline and its unfinished jobs. No further stage begins."""
    return services.pipelines.set_paused(caller.project, pipeline_id, True)


@router.post("/{pipeline_id}/resume")
def resume_pipeline(pipeline_id: str, caller: CallerDependency, services: ServicesDependency) -> PipelineObject:
    """Resume a paused pipeline and its jobs where they stopped."""
    return services.pipelines.set_paused(caller.project, pipeline_id, False)
