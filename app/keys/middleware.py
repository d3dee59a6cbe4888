"""What every request passes before a byte of its body is read: the Host header, the key, a limit on the body."""

from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ServiceError, TooLarge, Unauthenticated, Unavailable
from app.keys.service import Caller, Keys

PROBES = {"/healthz", "/readyz"}
"""For whoever runs the service, by whatever address it has."""
PUBLIC = PROBES | {"/docs", "/openapi.json"}


UPLOADS = {("POST", "/v1/files")}
MAX_BODY_BYTES = 1024 * 1024


def _limited(receive: Receive, headers: Headers) -> Receive:
    """`receive`, ended with `TooLarge` before a body over the limit is in memory."""
    too_large = TooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes.", code="body_too_large")
    if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise too_large
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            raise too_large
        return message

    return limited


class Gate:
    """ASGI middleware. FastAPI reads a multipart body before it runs dependencies; this stands before that."""

    def __init__(self, app: ASGIApp, keys: Keys, allowed_hosts: tuple[str, ...]) -> None:
        self.app, self.keys, self.allowed_hosts = app, keys, allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            if scope["path"] not in PROBES:
                self._check_host(headers)
            if scope["path"] not in PUBLIC:
                scope.setdefault("state", {})["caller"] = await self._caller(headers)
            if (scope["method"], scope["path"]) not in UPLOADS:
                receive = _limited(receive, headers)
        except ServiceError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if "*" not in self.allowed_hosts and name not in self.allowed_hosts:
            raise ServiceError(
                f"This service does not answer to the host name '{name}'. "
                "Its operator can add it to DPO_ALLOWED_HOSTS.",
                code="invalid_host",
            )

    async def _caller(self, headers: Headers) -> Caller:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated(
                "You didn't provide an API key. Send it in the header 'Authorization: Bearer KEY'.",
                code="missing_api_key",
            )
        try:
            caller = await run_in_threadpool(self.keys.identify, key.strip())
        except OperationalError as error:
            raise Unavailable("The database is out of reach.", code="database_unavailable") from error
        if caller is None:
            raise Unauthenticated("Incorrect or expired API key provided.", code="invalid_api_key")
        return caller


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


CallerDependency = Annotated[Caller, Depends(_caller)]
