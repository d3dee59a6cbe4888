"""Writes each change that a request has made to the audit log, before its answer is sent."""

from urllib.parse import unquote

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.audit.service import AuditLog
from app.keys.access import READING
from app.keys.schemas import Scope as KeyScope
from app.keys.service import Caller
from app.paths import own_path
from app.spec.json_types import JsonObject

MAX_DETAILS_BYTES = 4096
UNRECORDED = ("/v1/uploads/{upload_id}/parts", "/v1/labellings/{labelling_id}/next")
"""A part of an upload is no change yet: its completion is. Neither is an item to label: its verdict is."""


class AuditMiddleware:
    """ASGI middleware inside that of access, which says who the caller is and what the route needs."""

    def __init__(self, app: ASGIApp, audit: AuditLog) -> None:
        self.app, self.audit = app, audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller: Caller | None = scope.get("state", {}).get("caller")
        if scope["type"] != "http" or caller is None or scope["method"] in READING:
            await self.app(scope, receive, send)
            return
        # Only bodies that change the installation are kept: they are small, and hold no secret.
        keeps_body = scope["state"]["access"].scope == KeyScope.ADMIN
        body = bytearray()

        async def receive_observed() -> Message:
            message = await receive()
            if keeps_body and len(body) <= MAX_DETAILS_BYTES:
                body.extend(message.get("body", b""))
            return message

        async def send_recorded(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                await run_in_threadpool(self._record, scope, caller, bytes(body))
            await send(message)

        await self.app(scope, receive_observed, send_recorded)

    def _record(self, scope: Scope, caller: Caller, body: bytes) -> None:
        route = getattr(scope.get("route"), "path", "")
        action = f"{scope['method']} /v1{route}"
        if action.endswith(UNRECORDED):
            return
        self.audit.record(
            actor=caller.key_id,
            project=caller.project,
            action=action,
            subject=unquote(own_path(scope)),
            request_id=scope["state"].get("request_id"),
            details=_details(body),
        )


def _details(body: bytes) -> JsonObject | None:
    """The JSON object in a body; None if there is none, or if it is too large."""
    if not body or len(body) > MAX_DETAILS_BYTES:
        return None
    try:
        details = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return details if isinstance(details, dict) else None
