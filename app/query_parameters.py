"""The query parameters of a request. Unknown ones are refused by name, as unknown fields of a body are."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import Depends, Query, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from app.errors import ServiceError
from app.spec.schema_base import did_you_mean

METADATA = re.compile(r"metadata\[(.{0,64})\]", re.DOTALL)
EVERYWHERE = {"api-version"}
"""Parameters of every request. Azure's client sends this one."""


async def refuse_unknown(request: Request) -> None:
    """Raise `ServiceError` for a query parameter that the route does not have."""
    if not request.query_params:
        return
    route: APIRoute = request.scope["route"]
    known = set(_names(route.dependant))
    for name in request.query_params:
        is_pair = "metadata" in known and METADATA.fullmatch(name)
        if name not in known | EVERYWHERE and not is_pair:
            shown = name[:64]
            message = f"Unknown parameter: '{shown}'.{did_you_mean(shown, sorted(known))}"
            raise ServiceError(message, param=shown, code="unknown_parameter")


def _names(dependant: Dependant) -> Iterator[str]:
    """The names of the query parameters of a route and of its dependencies."""
    yield from (parameter.alias for parameter in dependant.query_params)
    for dependency in dependant.dependencies:
        yield from _names(dependency)


def _metadata(
    request: Request,
    metadata: Annotated[
        Literal["null"] | None,
        Query(
            description="`metadata[key]=value` keeps only objects whose metadata has that pair, and `metadata=null` "
            "those without metadata."
        ),
    ] = None,
) -> dict[str, str] | None:
    """The pairs that a list request filters by. None asks for objects without metadata."""
    if metadata == "null":
        return None
    pairs = request.query_params.items()
    return {match[1]: value for name, value in pairs if (match := METADATA.fullmatch(name))}


MetadataFilter = Annotated[dict[str, str] | None, Depends(_metadata)]
