"""/v1/operations. Every route needs a key with the scope `admin`."""

from fastapi import APIRouter

from app.dependencies import ServicesDependency
from app.keys.access import access
from app.keys.schemas import Scope
from app.operations.schemas import Operations, OperationsChange

router = APIRouter(prefix="/operations", tags=["administration"])


@router.get("")
@access(scope=Scope.ADMIN)
def get_operations(services: ServicesDependency) -> Operations:
    """The present stops."""
    return services.operations.get()


@router.post("")
@access(scope=Scope.ADMIN, when_read_only=True)
def change_operations(change: OperationsChange, services: ServicesDependency) -> Operations:
    """Stop the claims of all workers or all writes, or end that."""
    return services.operations.change(change)
