"""Every request has an id, and is counted and timed by route."""

import time

import structlog
from prometheus_client import CollectorRegistry, Histogram
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.database import new_id

METHODS = {"GET", "HEAD", "POST", "DELETE", "OPTIONS"}
"""Others are counted together: a caller must not make up new series."""
REQUEST_ID = "x-request-id"


class Observed:
    """ASGI middleware, the outermost one: it sees what the others refuse, too.

    The id is in the answer, where the official client shows it as `_request_id`, and in what is logged meanwhile.
    """

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
        began, answered = time.perf_counter(), False
        request_id = scope.setdefault("state", {})["request_id"] = new_id("req").replace("-", "_")

        def observe(status: int) -> None:
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.seconds.labels(method, _route(scope), status).observe(time.perf_counter() - began)

        async def watched(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                observe(message["status"])
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request=request_id):
            try:
                await self.app(scope, receive, watched)
            except Exception:
                if not answered:  # it is answered 500 above all middleware
                    observe(500)
                raise


def _route(scope: Scope) -> str:
    route = getattr(scope.get("route"), "path", None)
    if route is None:
        return "none"
    # FastAPI's route knows its path without the prefix that its router is included under.
    return f"/v1{route}" if scope["path"].startswith("/v1/") else str(route)
