"""Gives every request an id, and counts and times it by route."""

import time

import structlog
from prometheus_client import CollectorRegistry, Histogram
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.database import new_id
from app.paths import own_path

METHODS = {"GET", "HEAD", "POST", "DELETE", "OPTIONS"}
"""Other methods are counted together, so that no caller can create new series."""
REQUEST_ID = "x-request-id"


class RequestMetricsMiddleware:
    """The outermost ASGI middleware. It also sees the requests that the others refuse.

    The id is in the answer and in every log line of the request. The official client shows it as `_request_id`.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self.seconds = Histogram(
            "dpo_http_request_seconds",
            "Time until an answer begins. Route 'none': refused before routing.",
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

        async def send_observed(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                observe(message["status"])
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request=request_id):
            try:
                await self.app(scope, receive, send_observed)
            except Exception:
                if not answered:  # Starlette answers 500 outside all middleware
                    observe(500)
                raise


def _route(scope: Scope) -> str:
    route = getattr(scope.get("route"), "path", None)
    if route is None:
        return "none"
    # The path of a FastAPI route lacks the prefix under which its router is included.
    return f"/v1{route}" if own_path(scope).startswith("/v1/") else str(route)
