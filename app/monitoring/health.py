"""/healthz and /readyz, for operators and probes."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from app import __version__
from app.broker import Lane
from app.dependencies import ServicesDependency
from app.installation import database_installation, store_installation
from app.keys.access import access
from app.migrate import is_current
from app.services import Services
from app.workers import repository as workers

router = APIRouter(tags=["operations"])


@router.get("/healthz")
@access(public=True, any_host=True)
async def healthz() -> dict[str, str]:
    """The process answers."""
    # `async`, so that it waits for no free thread, however many requests there are.
    return {"status": "ok", "version": __version__}


@router.get("/readyz")
@access(public=True, any_host=True)
def readyz(services: ServicesDependency) -> JSONResponse:
    """The database has this version's schema, and the object store answers.

    `warnings` tells what does not keep the API from serving: GPU workers whose device fails.
    """
    problems = _problems(services)
    warnings = {} if "database" in problems else _warnings(services)
    answer = {"status": "ok" if not problems else "unavailable", "problems": problems, "warnings": warnings}
    return JSONResponse(answer, status_code=503 if problems else 200)


def _warnings(services: Services) -> dict[str, str]:
    """The faults that an operator should look at, by part."""
    with services.database.read() as session:
        present = workers.present(session, Lane.GPU)
    out, total = workers.out_of_service(present), len(present)
    return {"workers": f"{out} of {total} GPU workers are out of service; their logs say why"} if out else {}


def _problems(services: Services) -> dict[str, str]:
    """Why the service cannot serve, by the part that is not ready."""
    problems = {}
    try:
        if not is_current(services.database):
            problems["database"] = "the schema is not this version's; run 'dpo migrate'"
    except Exception as error:  # every error of a driver means: not ready
        problems["database"] = type(error).__name__
    try:
        services.storage.check()
        owner = store_installation(services.storage)
        if owner is not None and "database" not in problems and owner != database_installation(services.database):
            problems["storage"] = (
                "the object store belongs to another installation than the database; "
                "if they do belong together, delete the object 'installation'"
            )
    except Exception as error:  # as above
        problems["storage"] = type(error).__name__
    return problems
