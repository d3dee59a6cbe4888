"""/v1/keys, for keys with the scope `admin`."""

from typing import Annotated

from fastapi import APIRouter, Query

from app.dependencies import ServicesDependency
from app.keys.access import access
from app.keys.schemas import KeyObject, KeySpec, NewKeyObject, Scope
from app.pagination import Page, page

router = APIRouter(prefix="/keys", tags=["administration"])


@router.post("")
@access(scope=Scope.ADMIN)
def create_key(spec: KeySpec, services: ServicesDependency) -> NewKeyObject:
    """Make a key. Only this answer shows the key; the service does not store it."""
    return services.keys.create(spec)


@router.get("")
@access(scope=Scope.ADMIN)
def list_keys(
    services: ServicesDependency, project: Annotated[str | None, Query(max_length=64)] = None
) -> Page[KeyObject]:
    """All keys, oldest first, revoked ones too. `project` limits the list to one project."""
    keys = services.keys.list(project)
    return page(keys, len(keys))


@router.get("/{key_id}")
@access(scope=Scope.ADMIN)
def get_key(key_id: str, services: ServicesDependency) -> KeyObject:
    """One key."""
    return services.keys.get(key_id)


@router.delete("/{key_id}")
@access(scope=Scope.ADMIN)
def revoke_key(key_id: str, services: ServicesDependency) -> KeyObject:
    """Revoke a key: it is refused from now on."""
    return services.keys.revoke(key_id)
