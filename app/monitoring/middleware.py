"""Requests, counted and timed by route."""

import time

from prometheus_client import CollectorRegistry, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = {"GET", "HEAD", "POST", "DELETE", "OPTIONS"}
"""Others are counted together: a caller must not make up new series."""


class Measured:
    """ASGI middleware, the outermost one: it sees what the others refuse, too."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self.seconds = Histogram(
            "dpo_http_request_seconds",
            "Until an answer begins, by route; 'none' is what was refused before it had one.",
            ["method", "route", "status"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in METHODS else "other"
                self.seconds.labels(method, _route(scope), message["status"]).observe(time.perf_counter() - began)
            await send(message)

        await self.app(scope, receive, watched)


def _route(scope: Scope) -> str:
    route = getattr(scope.get("route"), "path", None)
    if route is None:
        return "none"
    # FastAPI's route knows its path without the prefix that its router is included under.
    return f"/v1{route}" if scope["path"].startswith("/v1/") else str(route)
