"""/v1/evaluations"""

from fastapi import APIRouter

from app.dependencies import ServicesDependency
from app.evaluations.schemas import EvaluationObject
from app.idempotency.service import RequestIdentityDependency
from app.jobs.kinds import EVALUATION_JOB
from app.jobs.routes import add_routes
from app.keys.middleware import CallerDependency
from app.spec.evaluation import EvaluationSpec

router = APIRouter(prefix="/evaluations", tags=["evaluations"])


@router.post("")
def create_evaluation(
    spec: EvaluationSpec, caller: CallerDependency, services: ServicesDependency, identity: RequestIdentityDependency
) -> EvaluationObject:
    """Start an evaluation. The service checks its files and queues it; then a GPU worker runs it."""
    return services.evaluations.create(caller.project, spec, identity)


add_routes(router, EVALUATION_JOB, EvaluationObject, lambda services: services.evaluations)
