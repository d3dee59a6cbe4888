"""/v1/keys, for keys with the scope `admin`."""

from typing import Annotated

from fastapi import APIRouter, Query

from app.dependencies import ServicesDependency
from app.keys.schemas import KeyObject, KeySpec, NewKeyObject
from app.pagination import Page, page

router = APIRouter(prefix="/keys", tags=["administration"])


@router.post("")
def create_key(spec: KeySpec, services: ServicesDependency) -> NewKeyObject:
    """Make a key. It is not stored: this answer is the only one that shows it."""
    return services.keys.create(spec)


@router.get("")
def list_keys(
    services: ServicesDependency, project: Annotated[str | None, Query(max_length=64)] = None
) -> Page[KeyObject]:
    """All keys, oldest first, revoked ones too; `project` keeps those of one project."""
    found = services.keys.list(project)
    return page(found, len(found))


@router.get("/{key_id}")
def get_key(key_id: str, services: ServicesDependency) -> KeyObject:
    """One key."""
    return services.keys.get(key_id)


@router.delete("/{key_id}")
def revoke_key(key_id: str, services: ServicesDependency) -> KeyObject:
    """Revoke a key: it is refused from now on."""
    return services.keys.revoke(key_id)
