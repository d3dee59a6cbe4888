"""POST /v1/fine_tuning/estimate"""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from app.dependencies import ServicesDependency
from app.estimates.schemas import Estimate
from app.keys.access import access
from app.keys.middleware import CallerDependency
from app.keys.schemas import Scope
from app.pending import NOT_READY, Pending, not_ready
from app.spec.json_types import JsonObject

router = APIRouter(prefix="/fine_tuning", tags=["fine-tuning"])

BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}


@router.post(
    "/estimate",
    openapi_extra=BODY,
    response_model=Estimate | Pending,
    responses=NOT_READY,
)
@access(scope=Scope.READ)
def estimate_job(body: JsonObject, caller: CallerDependency, services: ServicesDependency) -> Estimate | JSONResponse:
    """Estimate a job (tokens, steps, memory, time) and check whether a create would refuse it. Nothing is run."""
    estimate = services.estimates.estimate(caller.project, body)
    return not_ready(seconds=1) if estimate is None else estimate
