"""POST /v1/fine_tuning/estimate"""

from typing import Any

from fastapi import APIRouter, Response

from app.dataset_reports.schemas import Pending
from app.dependencies import ServicesDependency
from app.estimates.schemas import Estimate
from app.keys.access import access
from app.keys.middleware import CallerDependency
from app.keys.schemas import Scope

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
    responses={202: {"model": Pending, "description": "Its files are being counted; ask again after Retry-After."}},
)
@access(scope=Scope.READ)
def estimate_job(
    body: dict[str, Any], response: Response, caller: CallerDependency, services: ServicesDependency
) -> Estimate | Pending:
    """What a job would take (tokens, steps, memory, time) and what a create would refuse. Nothing is run."""
    found = services.estimates.estimate(caller.project, body)
    if found is None:
        response.status_code, response.headers["Retry-After"] = 202, "1"
        return Pending()
    return found
