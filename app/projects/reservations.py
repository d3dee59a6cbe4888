"""Reserve room in a project's storage before bytes arrive: parallel uploads cannot exceed its limit together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import delete, update
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.database import Database, database_now, new_id
from app.errors import Forbidden
from app.projects import repository
from app.projects.service import require_room
from app.projects.tables import Reservation

STEP_BYTES = 16 * 1024**2
"""Bytes to reserve at a time for a body of unknown length."""
OVERHEAD_BYTES = 64 * 1024
"""Bytes that a body may have beside the file: boundaries, headers and other fields."""
RESERVED_SECONDS = 6 * 3600.0
"""The longest time of an upload whose room is reserved all the while. It is checked again at its end."""


class Room:
    """The room that a request has reserved. A project without a limit needs no reservation."""

    def __init__(self, database: Database, project: str, *, limited: bool) -> None:
        self.database, self.project, self.limited = database, project, limited
        self.id, self.reserved = new_id("reservation"), 0

    async def covered(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same chunks. Room for each is reserved before it is passed on. Raises `Forbidden` if there is none."""
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            if self.limited and size > self.reserved:
                await run_in_threadpool(self._cover, size)
            yield chunk

    def _cover(self, size: int) -> None:
        """Reserve room for `size` bytes in all, and for some more if there is room. Raises `Forbidden`."""
        try:
            self.grow(max(STEP_BYTES, size - self.reserved))
        except Forbidden:
            self.grow(size - self.reserved)

    def grow(self, more: int) -> None:
        """Reserve `more` bytes. Raises `Forbidden` if the project has no room for them."""
        with self.database.write() as session:
            require_room(session, self.project, more)
            if self.reserved:
                session.execute(
                    update(Reservation).where(Reservation.id == self.id).values(bytes=Reservation.bytes + more)
                )
            else:
                expires_at = database_now() + RESERVED_SECONDS
                session.add(Reservation(id=self.id, project=self.project, bytes=more, expires_at=expires_at))
        self.reserved += more

    def release(self, session: Session) -> None:
        """Give the room back, in the transaction that counts what was stored, or that stores nothing."""
        if self.reserved:
            session.execute(delete(Reservation).where(Reservation.id == self.id))


class Reservations:
    """Reserves room for requests."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @asynccontextmanager
    async def room(self, project: str, size: int | None) -> AsyncIterator[Room]:
        """Room for a body of `size` bytes, or of unknown size. Raises `Forbidden` before the first byte comes.

        The end of the block gives back the rest.
        """
        room = await run_in_threadpool(self._begin, project, size)
        try:
            yield room
        finally:
            # Shielded, because a client that hangs up cancels this task.
            await asyncio.shield(run_in_threadpool(self._end, room))

    def _begin(self, project_id: str, size: int | None) -> Room:
        with self.database.read() as session:
            project = repository.get(session, project_id)
        room = Room(self.database, project_id, limited=project is not None and project.max_storage_bytes is not None)
        if room.limited and size is not None and size > OVERHEAD_BYTES:
            room.grow(size - OVERHEAD_BYTES)
        return room

    def _end(self, room: Room) -> None:
        if room.reserved:
            with self.database.write() as session:
                room.release(session)


def forget_expired(session: Session) -> None:
    """Delete the reservations of requests that have died."""
    session.execute(delete(Reservation).where(Reservation.expires_at < database_now()))
