"""/v1/usage"""

from typing import Annotated

from fastapi import APIRouter, Query

from app.dependencies import ServicesDependency
from app.errors import Forbidden
from app.keys.middleware import CallerDependency
from app.keys.schemas import Scope
from app.pagination import Page
from app.usage.schemas import UsageObject

router = APIRouter(prefix="/usage", tags=["administration"])
ALL = "*"
Month = Annotated[str | None, Query(pattern=r"^\d{4}-(0[1-9]|1[0-2])$", description="In UTC, such as `2026-11`.")]


@router.get("")
def list_usage(
    caller: CallerDependency,
    services: ServicesDependency,
    project: Annotated[
        str | None, Query(description="Another project, or `*` for all of them. Needs the scope `admin`.")
    ] = None,
    first_month: Month = None,
    last_month: Month = None,
) -> Page[UsageObject]:
    """The usage of a project by month: the caller's if no other is named."""
    name = project or caller.project
    if name != caller.project and not caller.may(Scope.ADMIN):
        raise Forbidden(
            "Only a key with the scope 'admin' sees the usage of other projects. Leave 'project' out for your own.",
            param="project",
            code="insufficient_scope",
        )
    usage = services.usage.list(None if name == ALL else name, first_month, last_month)
    return Page(data=usage, has_more=False)
