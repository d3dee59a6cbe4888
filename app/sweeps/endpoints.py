"""/v1/sweeps"""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from app.dependencies import ServicesDependency
from app.idempotency.service import RequestIdentityDependency
from app.keys.middleware import CallerDependency
from app.pagination import After, Page, page
from app.spec.sweep import SweepSpec
from app.sweeps.schemas import SweepObject

router = APIRouter(prefix="/sweeps", tags=["sweeps"])


@router.post("")
def create_sweep(
    spec: SweepSpec, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> SweepObject:
    """Start a job for each combination of the grid's values. If one of them cannot run, none is started."""
    return services.sweeps.create(caller.project, spec, identity)


@router.get("")
def list_sweeps(
    caller: CallerDependency,
    services: ServicesDependency,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=20)] = 20,
) -> Page[SweepObject]:
    """Sweeps, newest first."""
    return page(services.sweeps.page(caller.project, after=after, limit=limit), limit)


@router.get("/{sweep_id}")
def get_sweep(sweep_id: str, caller: CallerDependency, services: ServicesDependency) -> SweepObject:
    """One sweep: its jobs with their settings and metrics, and its frontier with the Pareto set."""
    return services.sweeps.get(caller.project, sweep_id)


@router.post("/{sweep_id}/cancel")
def cancel_sweep(
    sweep_id: str, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> SweepObject:
    """Cancel the jobs and evaluations of a sweep that have not ended."""
    return services.sweeps.cancel(caller.project, sweep_id, identity)


@router.get(
    "/{sweep_id}/frontier",
    response_class=Response,
    responses={200: {"content": {"image/svg+xml": {}, "text/csv": {}}}},
)
def get_sweep_frontier(
    sweep_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    format: Annotated[Literal["svg", "csv"], Query(description="`svg` is a chart, `csv` a table.")] = "svg",
) -> Response:
    """The frontier of two metrics, from the results so far. The default is reward against KL."""
    content, media_type = services.sweeps.frontier(caller.project, sweep_id, format)
    return Response(content, media_type=media_type)
