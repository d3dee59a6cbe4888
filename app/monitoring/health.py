"""/healthz and /readyz, for operators and probes."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from app import __version__
from app.broker import Lane
from app.dependencies import ServicesDependency
from app.keys.access import access
from app.monitoring.readiness import Readiness
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
def readyz(request: Request, services: ServicesDependency) -> JSONResponse:
    """The database has this version's schema, and the database and the object store can be read and written.

    `problems` tells reads from writes: `storage` cannot be used at all, `storage_writes` can only be read.
    `warnings` tells what does not keep the API from serving: workers that claim no jobs.
    """
    readiness: Readiness = request.app.state.readiness
    problems = readiness.problems()
    warnings = {} if "database" in problems else _warnings(services)
    answer = {"status": "ok" if not problems else "unavailable", "problems": problems, "warnings": warnings}
    return JSONResponse(answer, status_code=503 if problems else 200)


def _warnings(services: Services) -> dict[str, str]:
    """The faults that an operator should look at, by part."""
    with services.database.read() as session:
        present = {lane: workers.present(session, lane) for lane in Lane}
    broken, gpus = workers.device_out_of_service(present[Lane.GPU]), len(present[Lane.GPU])
    lost, total = sum(map(workers.without_store, present.values())), sum(map(len, present.values()))
    warnings = {}
    if broken:
        warnings["workers"] = f"{broken} of {gpus} GPU workers are out of service; their logs say why"
    if lost:
        warnings["storage"] = f"{lost} of {total} workers cannot reach the object store and claim no jobs"
    return warnings
