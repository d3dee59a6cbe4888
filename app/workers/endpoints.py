"""/v1/workers. Every route needs a key with the scope `admin`."""

from fastapi import APIRouter

from app.dependencies import ServicesDependency
from app.keys.access import access
from app.keys.schemas import Scope
from app.pagination import Page, page
from app.workers.schemas import WorkerChange, WorkerObject

router = APIRouter(prefix="/workers", tags=["administration"])


@router.get("")
@access(scope=Scope.ADMIN)
def list_workers(services: ServicesDependency) -> Page[WorkerObject]:
    """The workers that have reported in the last 90 seconds."""
    workers = services.workers.list()
    return page(workers, len(workers))


@router.post("/{name:path}")
@access(scope=Scope.ADMIN)
def change_worker(name: str, change: WorkerChange, services: ServicesDependency) -> WorkerObject:
    """Cordon a worker: it finishes its jobs and starts no more. Or let it start jobs again."""
    return services.workers.cordon(name, change.cordoned)
