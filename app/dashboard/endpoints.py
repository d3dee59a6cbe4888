"""/dashboard"""

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from app.dashboard.pages import POLICY, by_session, missing, page
from app.dashboard.session import COOKIE, ViewerDependency, from_this_site, home_of, sign_in
from app.dependencies import ServicesDependency
from app.errors import ServiceError
from app.evaluations.schemas import EvaluationObject
from app.jobs.lifecycle import Lifecycle
from app.jobs.schemas import JobObject, MetricSeries
from app.keys.middleware import address_of

EVENTS, JOBS, SWEEPS = 50, 50, 20

router = APIRouter(prefix="/dashboard", include_in_schema=False)


def _followed(
    request: Request,
    name: str,
    lifecycle: Lifecycle[JobObject] | Lifecycle[EvaluationObject],
    project: str,
    job_id: str,
) -> HTMLResponse:
    """The page of a job or evaluation, or for htmx only its changing part. `name` is "job" or "evaluation"."""
    try:
        job = lifecycle.get(project, job_id)
        events = lifecycle.events(project, job_id, after=None, limit=EVENTS)[:EVENTS]
    except ServiceError as error:
        return missing(request, error)
    context: dict[str, object] = {name: job, "events": [event for event in events if event.type == "message"]}
    template = f"{name}_live.html" if "hx-request" in request.headers else f"{name}.html"
    return page(request, template, 200, **context)


@router.get("/login")
@by_session
def login_page(request: Request) -> HTMLResponse:
    return page(request, "login.html", wrong=False)


@router.post("/login", dependencies=[Depends(from_this_site)])
@by_session
async def login(
    request: Request, services: ServicesDependency, key: Annotated[str, Form(max_length=512)] = ""
) -> Response:
    response = RedirectResponse(home_of(request), status_code=303)
    if not await run_in_threadpool(sign_in, services, request, response, key.strip()):
        await services.wrong_keys.note(address_of(request.scope))
        return page(request, "login.html", 401, wrong=True)
    return response


@router.post("/logout", dependencies=[Depends(from_this_site)])
@by_session
def logout(request: Request) -> Response:
    response = RedirectResponse(f"{home_of(request)}/login", status_code=303)
    response.delete_cookie(COOKIE, path=home_of(request))
    return response


@router.get("")
@by_session
def jobs(request: Request, viewer: ViewerDependency, services: ServicesDependency) -> HTMLResponse:
    newest = services.jobs.page(viewer.project, after=None, limit=JOBS, metadata={})[:JOBS]
    name = "jobs_rows.html" if "hx-request" in request.headers else "jobs.html"
    return page(request, name, jobs=newest, project=viewer.project)


@router.get("/jobs/{job_id}")
@by_session
def job(request: Request, job_id: str, viewer: ViewerDependency, services: ServicesDependency) -> HTMLResponse:
    return _followed(request, "job", services.jobs, viewer.project, job_id)


@router.get("/jobs/{job_id}/metrics")
@by_session
def metrics(job_id: str, viewer: ViewerDependency, services: ServicesDependency) -> MetricSeries:
    return services.jobs.metrics(viewer.project, job_id, None, 500)


@router.get("/evaluations")
@by_session
def evaluations(request: Request, viewer: ViewerDependency, services: ServicesDependency) -> HTMLResponse:
    newest = services.evaluations.page(viewer.project, after=None, limit=JOBS, metadata={})[:JOBS]
    name = "evaluations_rows.html" if "hx-request" in request.headers else "evaluations.html"
    return page(request, name, evaluations=newest, project=viewer.project)


@router.get("/evaluations/{evaluation_id}")
@by_session
def evaluation(
    request: Request, evaluation_id: str, viewer: ViewerDependency, services: ServicesDependency
) -> HTMLResponse:
    return _followed(request, "evaluation", services.evaluations, viewer.project, evaluation_id)


@router.get("/pipelines")
@by_session
def pipelines(request: Request, viewer: ViewerDependency, services: ServicesDependency) -> HTMLResponse:
    newest = services.pipelines.page(viewer.project, after=None, limit=SWEEPS)[:SWEEPS]
    return page(request, "pipelines.html", pipelines=newest, project=viewer.project)


@router.get("/pipelines/{pipeline_id}")
@by_session
def pipeline(
    request: Request, pipeline_id: str, viewer: ViewerDependency, services: ServicesDependency
) -> HTMLResponse:
    try:
        found = services.pipelines.get(viewer.project, pipeline_id)
    except ServiceError as error:
        return missing(request, error)
    name = "pipeline_live.html" if "hx-request" in request.headers else "pipeline.html"
    return page(request, name, pipeline=found)


@router.get("/sweeps")
@by_session
def sweeps(request: Request, viewer: ViewerDependency, services: ServicesDependency) -> HTMLResponse:
    newest = services.sweeps.page(viewer.project, after=None, limit=SWEEPS)[:SWEEPS]
    return page(request, "sweeps.html", sweeps=newest, project=viewer.project)


@router.get("/sweeps/{sweep_id}")
@by_session
def sweep(request: Request, sweep_id: str, viewer: ViewerDependency, services: ServicesDependency) -> HTMLResponse:
    try:
        sweep_object = services.sweeps.get(viewer.project, sweep_id)
    except ServiceError as error:
        return missing(request, error)
    return page(request, "sweep_live.html" if "hx-request" in request.headers else "sweep.html", sweep=sweep_object)


@router.get("/sweeps/{sweep_id}/frontier")
@by_session
def frontier(request: Request, sweep_id: str, viewer: ViewerDependency, services: ServicesDependency) -> Response:
    """The chart of a sweep's frontier, as SVG."""
    try:
        picture, media_type = services.sweeps.frontier(viewer.project, sweep_id, "svg")
    except ServiceError as error:
        return missing(request, error)
    return Response(picture, media_type=media_type, headers={"Content-Security-Policy": POLICY})


@router.get("/files/{file_id}")
@by_session
def file(
    request: Request, file_id: str, viewer: ViewerDependency, services: ServicesDependency, model: str | None = None
) -> HTMLResponse:
    """The report of a file. With `model`, its lengths and samples are in that model's tokens."""
    problem = None
    try:
        file_object = services.files.get(viewer.project, file_id)
        report = services.reports.get(viewer.project, file_id, model=None)
    except ServiceError as error:
        return missing(request, error)
    token_report = None
    if report is not None and model is not None:
        try:
            token_report = services.reports.get(viewer.project, file_id, model=model)
        except ServiceError as error:
            problem = error.message
    name = "file_report.html" if "hx-request" in request.headers else "file.html"
    return page(
        request,
        name,
        file=file_object,
        report=token_report or report,
        model=model,
        counting=bool(report is None or (model and token_report is None and problem is None)),
        problem=problem,
    )
