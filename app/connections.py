"""Connections to the API: how many there may be, and how long a client may take to send a request.

Whoever sends half a request and waits would otherwise hold a connection for ever, and a thousand of them stop the
service. Where there are too many connections, the one that has waited longest without a request makes room for a new
one. So a probe always gets in.
"""

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0
"""Time for a client to send a request's headers, from its first byte or from the start of the connection."""
BODY_SECONDS = 60.0
"""The longest pause in a body."""
MAX_CONNECTIONS, OTHER_FILES = 8192, 512
"""Maximum number of connections, and what is left of the process's open files for everything else."""


def most_connections() -> int:
    """How many connections this process may hold. Raises its limit of open files as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else soft - OTHER_FILES
    return max(16, min(MAX_CONNECTIONS, room))


class BoundedConnection(H11Protocol):
    """A connection with deadlines. `limit` is the maximum number of connections of its server."""

    limit = MAX_CONNECTIONS
    _timer: asyncio.TimerHandle | None = None

    @property
    def _waiting(self) -> "dict[BoundedConnection, None]":
        """The server's connections without a request, the one that has waited longest first."""
        waiting: dict[BoundedConnection, None] = vars(self.server_state).setdefault("waiting", {})
        return waiting

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting[self] = None
        self._set_deadline(HEADER_SECONDS)
        while len(self.connections) > self.limit and self._waiting:
            self._cut(next(iter(self._waiting)))
        if len(self.connections) > self.limit:
            self._cut(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.pop(self, None)
        self._set_deadline(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # the headers are not complete yet
            if self._timer is None:
                self._set_deadline(HEADER_SECONDS)
            return
        self._waiting.pop(self, None)
        self._set_deadline(BODY_SECONDS if self.cycle.more_body else None)

    def on_response_complete(self) -> None:
        self._set_deadline(None)  # uvicorn has a timer of its own for idle connections
        if not self.transport.is_closing():
            self._waiting[self] = None
        super().on_response_complete()

    def _set_deadline(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._overdue)

    def _overdue(self) -> None:
        if self.flow.read_paused:  # the service reads slowly, and not the client
            self._set_deadline(BODY_SECONDS)
        else:
            self._cut(self)

    @staticmethod
    def _cut(connection: "BoundedConnection") -> None:
        connection._waiting.pop(connection, None)
        connection.connections.discard(connection)
        connection.transport.abort()
