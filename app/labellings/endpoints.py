"""/v1/labellings"""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from app.dependencies import ServicesDependency
from app.idempotency.service import RequestIdentityDependency
from app.jobs.kinds import LABELLING_JOB
from app.jobs.routes import add_routes
from app.keys.access import access
from app.keys.middleware import CallerDependency
from app.keys.schemas import Scope
from app.labellings.schemas import LabellingEstimate, LabellingObject
from app.pending import NOT_READY, Pending, not_ready
from app.spec.labelling import LabellingSpec

router = APIRouter(prefix="/labellings", tags=["labellings"])


@router.post("")
def create_labelling(
    spec: LabellingSpec, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> LabellingObject:
    """Start a labelling. The service checks its files and queues it; then a GPU worker runs it."""
    return services.labellings.create(caller.project, spec, identity)


@router.post("/estimate", response_model=LabellingEstimate | Pending, responses=NOT_READY)
@access(scope=Scope.READ)
def estimate_labelling(
    spec: LabellingSpec, caller: CallerDependency, services: ServicesDependency
) -> LabellingEstimate | JSONResponse:
    """Estimate a labelling (answers, questions, tokens, money), and check whether a create would refuse it.

    Nothing is run.
    """
    estimate = services.labellings.estimate(caller.project, spec)
    return not_ready(seconds=1) if estimate is None else estimate


add_routes(router, LABELLING_JOB, LabellingObject, lambda services: services.labellings)
