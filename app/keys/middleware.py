"""The checks that every request passes before its body is read.

They cover the Host header, the key, its scope, its request rate, and the size of the body.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Annotated
from urllib.parse import parse_qs

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request
from sqlalchemy.exc import OperationalError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as ConnectionScope

from app.errors import Forbidden, NotFound, ServiceError, TooLarge, TooMany, Unauthenticated, Unavailable
from app.exception_handlers import error_answer
from app.keys.access import READING, Access, AccessTable
from app.keys.rates import RateLimiter, WrongKeys
from app.keys.schemas import Scope
from app.keys.service import Caller, Keys
from app.operations.service import require_writable
from app.paths import own_path

MAX_BODY_BYTES = 1024 * 1024
MAX_AT_WORK, MAX_WAITING = 4, 256
"""Requests of a project that each process works on at a time, and that may wait for it."""
ADMITTING_THREADS = 8
"""Threads that look at keys. They do nothing else, so a key is looked at however busy the others are."""


def _limited(receive: Receive, headers: Headers) -> Receive:
    """Wrap `receive` so that it raises `TooLarge` before a body over the limit is in memory."""
    too_large = TooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes.", code="body_too_large")
    if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise too_large
    received_bytes = 0

    async def limited() -> Message:
        nonlocal received_bytes
        message = await receive()
        received_bytes += len(message.get("body", b""))
        if received_bytes > MAX_BODY_BYTES:
            raise too_large
        return message

    return limited


def address_of(scope: ConnectionScope) -> str:
    """The address from which a request comes."""
    client: tuple[str, int] | None = scope.get("client")
    return "" if client is None else client[0]


class Turns:
    """Each project has `MAX_AT_WORK` requests worked on at a time. Its further ones wait, and hold up no other project.

    A request's turn ends when its answer begins: streams and downloads take none. Raises `TooMany` if too many wait.
    """

    def __init__(self) -> None:
        self._at_work, self._waiting = defaultdict[str, asyncio.Semaphore](_semaphore), Counter[str]()

    async def take(self, project: str) -> Callable[[], None]:
        """Wait for a turn. Returns a function that ends it, and may be called again."""
        if self._waiting[project] >= MAX_WAITING:
            message = f"{MAX_WAITING} requests of this project wait to be worked on. Send fewer at a time."
            raise TooMany(message, 1, code="too_many_requests_at_a_time")
        self._waiting[project] += 1
        try:
            await self._at_work[project].acquire()
        finally:
            self._waiting[project] -= 1
        has_ended = False

        def end() -> None:
            nonlocal has_ended
            if not has_ended:
                has_ended = True
                self._at_work[project].release()

        return end


def _semaphore() -> asyncio.Semaphore:
    return asyncio.Semaphore(MAX_AT_WORK)


class AccessMiddleware:
    """ASGI middleware that checks access. FastAPI reads a multipart body before its dependencies: they are too late."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        limiter: RateLimiter,
        wrong_keys: WrongKeys,
        allowed_hosts: tuple[str, ...],
        routes: AccessTable,
    ) -> None:
        self.app, self.keys, self.limiter, self.wrong_keys = app, keys, limiter, wrong_keys
        self.allowed_hosts, self.routes = allowed_hosts, routes
        self.turns, self.threads = Turns(), CapacityLimiter(ADMITTING_THREADS)

    async def __call__(self, scope: ConnectionScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        end_turn: Callable[[], None] = lambda: None  # noqa: E731 - a request without a key has none
        try:
            headers, method, path = Headers(scope=scope), scope["method"], own_path(scope)
            if not path.isprintable():  # a router may read a line break as the path's end
                raise NotFound("Unknown request URL: it holds a control character.", code="unknown_url")
            access = self.routes.find(method, path)
            if not access.any_host:
                self._check_host(headers)
            if not access.public:
                request = (access, headers, method, path, scope["query_string"])
                caller = await to_thread.run_sync(self._admit, *request, limiter=self.threads)
                scope.setdefault("state", {}).update(caller=caller, access=access)
                end_turn = await self.turns.take(caller.project)
            if not access.streams_body:
                receive = _limited(receive, headers)
        except ServiceError as error:
            if isinstance(error, Unauthenticated):
                await self.wrong_keys.note(address_of(scope))
            await error_answer(error)(scope, receive, send)
            return

        async def send_and_end_turn(message: Message) -> None:
            end_turn()
            await send(message)

        try:
            await self.app(scope, receive, send_and_end_turn)
        finally:
            end_turn()

    def _admit(self, access: Access, headers: Headers, method: str, path: str, query: bytes) -> Caller:
        """The caller. Raises `ServiceError` if the key, its scope or its rate does not allow the request."""
        caller = self._stream_caller(path, query) if access.stream_token and "authorization" not in headers else None
        caller = caller or self._caller(headers)
        self._check_scope(caller, access.required(method))
        self.limiter.check(caller)
        if method not in READING and not access.when_read_only:
            require_writable(self.keys.database)
        return caller

    @staticmethod
    def _check_scope(caller: Caller, needed: Scope) -> None:
        if not caller.may(needed):
            scopes = ", ".join(sorted(caller.scopes))
            message = f"This needs a key with the scope '{needed}'; this one has: {scopes}."
            raise Forbidden(message, code="insufficient_scope")

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if "*" not in self.allowed_hosts and name not in self.allowed_hosts:
            raise ServiceError(
                f"This service does not answer to the host name '{name}'. "
                "Its operator can add it to DPO_ALLOWED_HOSTS.",
                code="invalid_host",
            )

    def _stream_caller(self, path: str, query: bytes) -> Caller | None:
        """The caller that the stream token in the query stands for; None if the query has no token."""
        token = parse_qs(query.decode("latin-1")).get("token")
        if not token:
            return None
        caller = self.keys.identify_stream(token[0], path)
        if caller is None:
            raise Unauthenticated("Incorrect or expired stream token.", code="invalid_stream_token")
        return caller

    def _caller(self, headers: Headers) -> Caller:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated(
                "You didn't provide an API key. Send it in the header 'Authorization: Bearer KEY'.",
                code="missing_api_key",
            )
        try:
            caller = self.keys.identify(key.strip())
        except OperationalError as error:
            raise Unavailable("The database is out of reach.", code="database_unavailable") from error
        if caller is None:
            raise Unauthenticated("Incorrect or expired API key provided.", code="invalid_api_key")
        return caller


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


CallerDependency = Annotated[Caller, Depends(_caller)]
