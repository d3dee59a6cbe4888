"""The access rules of routes. A route declares them with `@access(scope=Scope.ADMIN)` under its route decorator.

A route without rules needs a key: with the scope `read` for GET and HEAD, with `write` for every other method.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from re import Pattern
from typing import Any, TypeVar

from starlette.routing import BaseRoute, Mount, Route, compile_path

from app.keys.schemas import Scope

Handler = TypeVar("Handler")
READING = ("GET", "HEAD")


@dataclass(frozen=True)
class Access:
    """The access rules of a route."""

    scope: Scope | None = None
    """The scope that the key must have; None means that the method decides."""
    public: bool = False
    """No key is needed."""
    any_host: bool = False
    """Any Host header is accepted, because operators and probes may call any address of the service."""
    stream_token: bool = False
    """A token in the query string may replace the key."""
    when_read_only: bool = False
    """A write is allowed even while nothing else may be changed."""
    streams_body: bool = False
    """The body is read as a stream, with its own size limit."""

    def required(self, method: str) -> Scope:
        """The scope that a key must have for a request with this method."""
        return self.scope or (Scope.READ if method in READING else Scope.WRITE)


def access(**declared: Any) -> Callable[[Handler], Handler]:
    """Declare the fields of `Access` on an endpoint or on a mounted app."""

    def declare(handler: Handler) -> Handler:
        handler.__access__ = Access(**declared)  # type: ignore[attr-defined]
        return handler

    return declare


class AccessTable:
    """The access rules of every route, in the order in which the routes are tried."""

    def __init__(self) -> None:
        self._rows: list[tuple[Pattern[str], set[str] | None, Access]] = []

    def add(self, routes: Iterable[BaseRoute], prefix: str = "") -> None:
        """Add `routes`. Their paths in the application begin with `prefix`."""
        for route in routes:
            if isinstance(route, Route):
                pattern, methods, target = compile_path(prefix + route.path)[0], route.methods, route.endpoint
            elif isinstance(route, Mount):
                pattern, methods, target = compile_path(f"{prefix}{route.path}/{{path:path}}")[0], None, route.app
            else:
                raise TypeError(f"a route of an unknown kind: {route!r}")
            self._rows.append((pattern, methods, getattr(target, "__access__", Access())))

    def find(self, method: str, path: str) -> Access:
        """The access rules of the route that answers; the default rules if none does."""
        matching = self._matching(path)
        for methods, rules in matching:
            if methods is None or method in methods or (method == "HEAD" and "GET" in methods):
                return rules
        # The path has routes, but none for the method: the answer is 405.
        return replace(matching[0][1], streams_body=False) if matching else Access()

    def methods(self, path: str) -> list[str]:
        """The methods of all routes of a path, sorted. Starlette's own answer names those of the first one."""
        found = {method for methods, _ in self._matching(path) for method in methods or READING}
        return sorted(found | ({"HEAD"} if "GET" in found else set()))

    def _matching(self, path: str) -> list[tuple[set[str] | None, Access]]:
        """(methods, rules) of the routes of a path, in their order. Methods None means any."""
        return [(methods, rules) for pattern, methods, rules in self._rows if pattern.match(path)]
