"""/v1/labellings"""

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, StreamingResponse

from app.dependencies import ServicesDependency
from app.idempotency.service import RequestIdentityDependency
from app.jobs.kinds import LABELLING_JOB
from app.jobs.routes import add_routes
from app.keys.access import access
from app.keys.middleware import CallerDependency
from app.keys.schemas import Scope
from app.labellings.export import ExportFormat
from app.labellings.schemas import Given, LabellingEstimate, LabellingObject, PeopleState, Verdicts, VerdictSpec
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


@router.post("/{labelling_id}/next")
@access(scope=Scope.LABEL)
def next_item(labelling_id: str, caller: CallerDependency, services: ServicesDependency) -> Given:
    """Take the next item to label. It is kept for this key for some minutes. Asking again gives the same one."""
    return services.people.next(caller, labelling_id)


@router.post("/{labelling_id}/verdicts")
@access(scope=Scope.LABEL)
def give_verdict(
    labelling_id: str, verdict: VerdictSpec, caller: CallerDependency, services: ServicesDependency
) -> Given:
    """Rank, skip or flag an item. The answer has the next one. The same verdict sent twice counts once."""
    return services.people.answer(caller, labelling_id, verdict)


@router.post("/{labelling_id}/verdicts/undo")
@access(scope=Scope.LABEL)
def undo_verdict(labelling_id: str, caller: CallerDependency, services: ServicesDependency) -> Given:
    """Take back this key's last verdict, and label its item anew."""
    return services.people.undo(caller, labelling_id)


@router.get("/{labelling_id}/verdicts")
def list_verdicts(labelling_id: str, caller: CallerDependency, services: ServicesDependency) -> Verdicts:
    """All verdicts of people, oldest first, with those that were taken back."""
    return Verdicts(data=services.people.verdicts(caller.project, labelling_id))


@router.get(
    "/{labelling_id}/export",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/json": {}}}},
)
def export_labels(
    labelling_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    format: Annotated[ExportFormat, Query(description="The tool whose form it has.")] = "label_studio",
) -> StreamingResponse:
    """All verdicts, as Label Studio or Argilla export them. Both can be uploaded as a file for training."""
    labels = services.people.export(caller.project, labelling_id, format)
    return StreamingResponse(labels, media_type="application/json")


@router.get("/{labelling_id}/people")
def get_people(labelling_id: str, caller: CallerDependency, services: ServicesDependency) -> PeopleState:
    """How far people are, and what each has done."""
    return services.people.state(caller.project, labelling_id)


@router.post("/{labelling_id}/close")
def close_labelling(labelling_id: str, caller: CallerDependency, services: ServicesDependency) -> LabellingObject:
    """Wait for people no longer, and make the file from the verdicts so far."""
    services.people.close(caller.project, labelling_id)
    return services.labellings.get(caller.project, labelling_id)


add_routes(router, LABELLING_JOB, LabellingObject, lambda services: services.labellings)
