"""What a request must bring, declared on its route: `@access(scope=Scope.ADMIN)` under the route's decorator.

A route that declares nothing needs a key: with the scope `read` for GET, with `write` for every other method.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from re import Pattern
from typing import Any, TypeVar

from starlette.routing import BaseRoute, Mount, Route, compile_path

from app.keys.schemas import Scope

Endpoint = TypeVar("Endpoint")
READING = ("GET", "HEAD")


@dataclass(frozen=True)
class Access:
    """What a route asks of a request."""

    scope: Scope | None = None
    """The scope that the key must have; None: by the method."""
    public: bool = False
    """No key is asked for."""
    any_host: bool = False
    """The service answers under every host name: whoever runs it asks by whatever address it has."""
    stream_token: bool = False
    """A token in the query may stand in for the key."""
    streams_body: bool = False
    """The body is read as a stream, with a limit of its own."""

    def required(self, method: str) -> Scope:
        """The scope that a key must have."""
        return self.scope or (Scope.READ if method in READING else Scope.WRITE)


def access(**declared: Any) -> Callable[[Endpoint], Endpoint]:
    """Declare the fields of `Access` on an endpoint or on an app that is mounted."""

    def declare(endpoint: Endpoint) -> Endpoint:
        endpoint.__access__ = Access(**declared)  # type: ignore[attr-defined]
        return endpoint

    return declare


class AccessTable:
    """The access of every route, in the order in which the routes are tried."""

    def __init__(self) -> None:
        self._rows: list[tuple[Pattern[str], set[str] | None, Access]] = []

    def add(self, routes: Iterable[BaseRoute], prefix: str = "") -> None:
        """Add `routes`, whose paths begin with `prefix` in the application."""
        for route in routes:
            if isinstance(route, Route):
                pattern, methods, target = compile_path(prefix + route.path)[0], route.methods, route.endpoint
            elif isinstance(route, Mount):
                pattern, methods, target = compile_path(f"{prefix}{route.path}/{{path:path}}")[0], None, route.app
            else:
                raise TypeError(f"a route of an unknown kind: {route!r}")
            self._rows.append((pattern, methods, getattr(target, "__access__", Access())))

    def find(self, method: str, path: str) -> Access:
        """The access of the route that answers; the default one where none does."""
        matching = [(methods, found) for pattern, methods, found in self._rows if pattern.match(path)]
        for methods, found in matching:
            if methods is None or method in methods or (method == "HEAD" and "GET" in methods):
                return found
        # The path has routes, but none for the method: the answer is 405.
        return replace(matching[0][1], streams_body=False) if matching else Access()
