"""Follow jobs: one asyncio task polls the database for all event streams of this process, every half second.

A job's stream sends its events in order, and its state whenever the state changes. A client can resume a stream after
any event. With 200 open streams, one poll is one query for the newest event of each job. Each stream with news then
runs one more query.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog
from sqlalchemy import func, select
from starlette.concurrency import run_in_threadpool

from app.database import Database
from app.errors import TooMany
from app.jobs import events as job_events
from app.jobs.tables import JobEvent

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.5
MAX_STREAMS = 256
"""Maximum number of open streams of a key, at each process of the API."""


@dataclass(eq=False)
class Follower:
    """A stream that waits for new events of a job."""

    job_id: str
    key_id: str
    last_sequence: int
    """The number of the last event that the stream has sent."""
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Feed:
    """Wakes each follower when its job has new events."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._followers: set[Follower] = set()
        self._task: asyncio.Task[None] | None = None
        self.closed = False

    @asynccontextmanager
    async def follow(self, job_id: str, last_sequence: int, key_id: str) -> AsyncIterator[Follower]:
        """A follower whose `news` is set whenever the job has events after its `last_sequence`. A key opens it."""
        follower = Follower(job_id, key_id, last_sequence)
        self._followers.add(follower)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    def require_place(self, key_id: str) -> None:
        """Raise `TooMany` if a key has `MAX_STREAMS` open streams at this process."""
        if sum(follower.key_id == key_id for follower in list(self._followers)) >= MAX_STREAMS:
            message = f"This key has {MAX_STREAMS} open event streams. Close some, or follow the jobs by webhooks."
            raise TooMany(message, 10, code="too_many_streams")

    async def close(self) -> None:
        """Stop polling, and let every stream end."""
        self.closed = True
        if self._task is not None:
            self._task.cancel()
        for follower in self._followers:
            follower.news.set()

    async def _watch(self) -> None:
        while self._followers:
            try:
                newest = await run_in_threadpool(self._newest, {follower.job_id for follower in self._followers})
            except Exception as error:  # the database may be unreachable for a while; the streams stay open
                log.warning("event streams wait", reason=type(error).__name__)
            else:
                for follower in self._followers:
                    if newest.get(follower.job_id, 0) > follower.last_sequence:
                        follower.news.set()
            await asyncio.sleep(POLL_SECONDS)

    def _newest(self, jobs: set[str]) -> dict[str, int]:
        """The number of the newest event, by job id."""
        statement = select(JobEvent.job_id, func.max(JobEvent.sequence)).where(JobEvent.job_id.in_(jobs))
        with self.database.read() as session:
            return {row[0]: row[1] for row in session.execute(statement.group_by(JobEvent.job_id))}

    def after(self, job_id: str, last_sequence: int, limit: int = 500) -> list[JobEvent]:
        """Up to `limit` events of a job after number `last_sequence`, in order."""
        with self.database.read() as session:
            return job_events.after(session, job_id, last_sequence, limit)
