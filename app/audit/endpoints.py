"""/v1/audit. It needs a key with the scope `admin`."""

from typing import Annotated

from fastapi import APIRouter, Query

from app.audit.schemas import AuditObject
from app.dependencies import ServicesDependency
from app.keys.access import access
from app.keys.schemas import Scope
from app.pagination import After, Page, page

router = APIRouter(prefix="/audit", tags=["administration"])
Filter = Annotated[str | None, Query(max_length=200)]


@router.get("")
@access(scope=Scope.ADMIN)
def list_audit_events(
    services: ServicesDependency,
    project: Filter = None,
    actor: Filter = None,
    action: Annotated[str | None, Query(max_length=200, description="The beginning, such as `DELETE`.")] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[AuditObject]:
    """Who changed what, and when, newest first."""
    return page(services.audit.page(project=project, actor=actor, action=action, after=after, limit=limit), limit)
