"""/dashboard/label: the pages on which people label."""

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from app.dashboard.pages import by_session, missing, page
from app.dashboard.session import AnnotatorDependency, from_this_site, home_of
from app.dependencies import ServicesDependency
from app.errors import ServiceError, Unavailable
from app.keys.service import Caller
from app.labellings.schemas import Given, VerdictSpec
from app.operations.service import require_writable
from app.services import Services

router = APIRouter(prefix="/dashboard/label", include_in_schema=False)
LETTERS = "ABCDEFGHI"


def refuse(request: Request, _error: Exception) -> Response:
    """The answer to `MayNotLabel`."""
    message = "This needs a key with the scope 'label'. `dpo keys create --scope label` makes one."
    return page(request, "missing.html", 403, heading="Not allowed", message=message)


@router.get("")
@by_session
def labellings(request: Request, annotator: AnnotatorDependency, services: ServicesDependency) -> HTMLResponse:
    """The labellings that wait for people."""
    return page(request, "label_list.html", labellings=services.people.open(annotator.project))


@router.get("/{labelling_id}")
@by_session
def label(
    request: Request, labelling_id: str, annotator: AnnotatorDependency, services: ServicesDependency
) -> HTMLResponse:
    """The next item of a labelling."""
    try:
        require_writable(services.database)  # to give an item to somebody is a change
        given = services.people.next(annotator, labelling_id)
    except ServiceError as error:
        return missing(request, error)
    return _item(request, labelling_id, given)


@router.post("/{labelling_id}", dependencies=[Depends(from_this_site)])
@by_session
def answer(
    request: Request,
    labelling_id: str,
    annotator: AnnotatorDependency,
    services: ServicesDependency,
    item: Annotated[int, Form(ge=0, le=2**31 - 1)],
    verdict: Annotated[str, Form(max_length=200)] = "",
    reason: Annotated[str, Form(max_length=2000)] = "",
) -> Response:
    """Store a verdict: `skip`, `flag`, `undo`, or groups of places with the best group first, such as `1 0,2`."""
    try:
        require_writable(services.database)
        _store(services, annotator, labelling_id, item, verdict, reason)
    except Unavailable as error:
        return missing(request, error)
    except ServiceError as error:
        try:
            given = services.people.next(annotator, labelling_id)
        except ServiceError:
            return missing(request, error)
        return _item(request, labelling_id, given, problem=error.message, status=error.status)
    services.audit.record(
        actor=annotator.key_id,
        project=annotator.project,
        action=f"POST /v1/labellings/{{labelling_id}}/verdicts{'/undo' if verdict == 'undo' else ''}",
        subject=f"/v1/labellings/{labelling_id}/verdicts",
        request_id=request.state.request_id,
    )
    return RedirectResponse(f"{home_of(request)}/label/{labelling_id}", status_code=303)


def _store(services: Services, annotator: Caller, labelling_id: str, item: int, verdict: str, reason: str) -> None:
    """Raises `ServiceError`."""
    if verdict == "undo":
        services.people.undo(annotator, labelling_id)
        return
    try:
        if verdict == "skip":
            spec = VerdictSpec(item=item, skip=True)
        elif verdict == "flag":
            spec = VerdictSpec(item=item, flag=reason.strip() or "no reason given")
        else:
            ranking = [[int(place) for place in group.split(",")] for group in verdict.split()]
            spec = VerdictSpec(item=item, ranking=ranking)
    except ValueError:
        raise ServiceError("Give each answer a rank first.", param="verdict", code="invalid_value") from None
    services.people.answer(annotator, labelling_id, spec)


def _item(
    request: Request, labelling_id: str, given: Given, problem: str | None = None, status: int = 200
) -> HTMLResponse:
    return page(request, "label.html", status, labelling_id=labelling_id, given=given, letters=LETTERS, problem=problem)
