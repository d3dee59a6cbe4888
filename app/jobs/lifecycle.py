"""The HTTP operations that all kinds of jobs share: get, list, follow, pause, resume and cancel."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from typing import ClassVar, Generic, TypeVar
from urllib.parse import quote

import structlog
from fastapi.sse import ServerSentEvent
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.broker import Broker, Lane
from app.database import Database, new_id
from app.errors import Conflict, no_such
from app.idempotency.service import RequestIdentity
from app.jobs import events as job_events
from app.jobs import labels, queries, transitions
from app.jobs import queue as job_queue
from app.jobs.event_feed import Feed
from app.jobs.kinds import AnySpec, JobKind
from app.jobs.queue_forecast import QueuePlace, forecast
from app.jobs.schemas import EventObject, StreamToken
from app.jobs.states import ACTIVE, Actor, Status
from app.jobs.tables import Job, JobInput, OtherBase
from app.keys.service import Caller, Keys
from app.projects.service import require_room
from app.spec.json_types import JsonObject
from app.storage import Storage

log = structlog.get_logger(__name__)

Shown = TypeVar("Shown", bound=BaseModel)
STREAM_BATCH = 500
STATE_SECONDS = 5.0
"""The longest time between two reads of the job's state by a stream. The queue position changes without an event."""


def log_key(job_id: str, attempt: int) -> str:
    """The key of an attempt's trainer log in the object store."""
    return f"jobs/{job_id}/attempt-{attempt}/trainer.log"


class Lifecycle(ABC, Generic[Shown]):
    """The jobs of one kind."""

    KIND: ClassVar[JobKind]

    def __init__(self, database: Database, storage: Storage, broker: Broker, keys: Keys, feed: Feed) -> None:
        self.database, self.storage, self.broker, self.keys, self.feed = database, storage, broker, keys, feed

    @abstractmethod
    def show(self, job: Job, place: QueuePlace | None = None) -> Shown:
        """The API object of a job. `place` is its place in the queue or on a worker."""

    def _create(self, project: str, spec: AnySpec, identity: RequestIdentity, add: Callable[[Session], Job]) -> Shown:
        """Store a job with `add`, unless this request was sent before. Then wake a CPU worker to check its files."""
        operation, content = f"{self.KIND.noun}s.create", spec.to_store()
        with self.database.write() as session:
            earlier_id = identity.earlier(session, operation, content)
            job = None if earlier_id is None else queries.get(session, project, earlier_id, self.KIND)
            if job is None:
                job = add(session)
                identity.record(session, operation, content, job.id)
        log.info(f"{self.KIND.noun} accepted", job=job.id, project=project, request=identity.request_id)
        self.broker.wake(Lane.CPU)
        return self.show(job) if earlier_id is None else self.get(project, job.id)

    def _add(
        self,
        session: Session,
        project: str,
        submitted: AnySpec,
        request_id: str | None,
        bases: Iterable[str],
        **columns: object,
    ) -> Job:
        """Store a job that waits for the check of its files.

        `submitted` is the spec as the user sent it. `bases` names the base models that the job loads. `columns` holds
        the columns that depend on the kind. Raises `Forbidden` if the project is at a limit.
        """
        require_room(session, project, 0)
        job_queue.require_place(session, project, submitted.priority)
        job = Job(
            id=new_id(self.KIND.id_prefix),
            kind=self.KIND.name,
            project=project,
            job_metadata=submitted.metadata,
            request_id=request_id,
            priority=submitted.priority,
            timeout_seconds=submitted.timeout_seconds,
            status=Status.VALIDATING,
            paused=False,
            ran_seconds=0.0,
            result_files=[],
            attempt=0,
            eligible_at=0.0,
            lost_attempts=0,
            inputs_listed=True,
            **columns,
        )
        session.add(job)
        session.flush()
        session.add_all(OtherBase(job_id=job.id, base_model=name) for name in {*bases} - {job.base_model})
        labels.label(session, job)
        session.add_all(JobInput(job_id=job.id, name=name) for name in queries.inputs_of(job))
        job_events.add(session, job.id, f"Created {self.KIND.title}: {job.id}")
        return job

    def _require_job(self, session: Session, project: str, job_id: str, param: str | None = None) -> Job:
        """The row of a job that `project` may see. Raises `NotFound` if there is none."""
        job = queries.get(session, project, job_id, self.KIND)
        if job is None:
            raise no_such(self.KIND.title, job_id, code=self.KIND.code, param=param)
        return job

    def get(self, project: str, job_id: str) -> Shown:
        with self.database.read() as session:
            job = self._require_job(session, project, job_id)
            places = forecast(session, [job])
            return self.show(job, places.get(job.id))

    def page(self, project: str, *, after: str | None, limit: int, metadata: dict[str, str] | None) -> list[Shown]:
        """Up to `limit` + 1 jobs, newest first. `metadata` is as in `queries.page`."""
        with self.database.read() as session:
            after_job = None if after is None else self._require_job(session, project, after, "after")
            jobs = queries.page(session, project, after=after_job, limit=limit, metadata=metadata, kind=self.KIND)
            places = forecast(session, jobs)
            return [self.show(job, places.get(job.id)) for job in jobs]

    def cancel(self, project: str, job_id: str, identity: RequestIdentity) -> Shown:
        """Cancel an unfinished job. Its worker notices at its next heartbeat, seconds later."""
        with self.database.write() as session:
            job = self._require_job(session, project, job_id)
            status = Status(job.status)
            # The worker may change the status between this read and the write. Hence the loop tries each active state.
            for source in (status, *(other for other in ACTIVE if other != status)):
                if status in ACTIVE and transitions.transition(
                    session,
                    job_id,
                    source,
                    Status.CANCELLED,
                    actor=Actor.API,
                    message=f"The {self.KIND.noun} was cancelled.",
                ):
                    break
            else:
                if not (identity.resent and status == Status.CANCELLED):  # the answer to the first sending was lost
                    raise Conflict(
                        f"{self.KIND.noun.capitalize()} {job_id} is {job.status} already.", code="job_already_ended"
                    )
        return self.get(project, job_id)

    def pause(self, project: str, job_id: str) -> Shown:
        """Pause a job. Within seconds, a running one writes a checkpoint, frees its GPU and returns to the queue."""
        return self._set_paused(project, job_id, True, f"The {self.KIND.noun} was paused.")

    def resume(self, project: str, job_id: str) -> Shown:
        """Resume a paused job from its last checkpoint. It keeps its old place in the queue."""
        resumed = self._set_paused(project, job_id, False, f"The {self.KIND.noun} was resumed.")
        self.broker.wake(Lane.GPU)
        return resumed

    def _set_paused(self, project: str, job_id: str, paused: bool, message: str) -> Shown:
        with self.database.write() as session:
            job = self._require_job(session, project, job_id)
            if job.paused != paused or job.status not in ACTIVE:
                if not job_queue.set_paused(session, job_id, paused):
                    raise Conflict(
                        f"{self.KIND.noun.capitalize()} {job_id} is {job.status} already.", code="job_already_ended"
                    )
                job_events.add(session, job_id, message)
        return self.get(project, job_id)

    def events(self, project: str, job_id: str, *, after: str | None, limit: int) -> list[EventObject]:
        """Up to `limit` + 1 events, newest first."""
        with self.database.read() as session:
            self._require_job(session, project, job_id)
            events = job_events.page(session, job_id, after=after, limit=limit)
        if events is None:
            raise no_such(f"event of this {self.KIND.noun}", after or "", code="event", param="after")
        return [EventObject.of(event) for event in events]

    def stream_token(self, caller: Caller, job_id: str, root_path: str) -> StreamToken:
        """A token that opens the job's stream in a browser, whose EventSource sends no key.

        The service is below `root_path` of its host.
        """
        with self.database.read() as session:
            self._require_job(session, caller.project, job_id)
        path = f"{self.KIND.path}/{job_id}/stream"
        token, expires_at = self.keys.stream_token(caller.key_id, path)
        return StreamToken(token=token, expires_at=expires_at, url=f"{root_path}{path}?token={quote(token, safe='')}")

    async def stream(self, caller: Caller, job_id: str, last_sequence: int) -> AsyncIterator[ServerSentEvent]:
        """Yield the job's events after number `last_sequence` and its state, then each change of both, until it ends.

        An event carries its id. A state carries no id and follows the events that changed it. The stream also ends when
        the caller's key is not valid any more.
        """
        last_state: JsonObject | None = None
        async with self.feed.follow(job_id, last_sequence, caller.key_id) as follower:
            while not self.feed.closed:
                follower.news.clear()
                if await run_in_threadpool(self.keys.holder, caller.key_id) is None:
                    return
                # Read the state before the events. If the job has ended by then, no event can be missing.
                job = await run_in_threadpool(self.get, caller.project, job_id)
                events = await run_in_threadpool(self.feed.after, job_id, follower.last_sequence)
                for event in events:
                    follower.last_sequence = event.sequence
                    yield ServerSentEvent(event=event.type, id=event.id, data=EventObject.of(event))
                if len(events) >= STREAM_BATCH:
                    continue  # there may be more
                # Leave out the fields that change with the clock.
                state = job.model_dump(exclude={"estimated_start", "estimated_finish", "running_seconds"})
                if state != last_state:
                    last_state = state
                    yield ServerSentEvent(event=self.KIND.noun, data=job)
                if state["status"] not in ACTIVE:
                    return
                if events:
                    continue  # they may have changed the state
                with suppress(TimeoutError):
                    await asyncio.wait_for(follower.news.wait(), STATE_SECONDS)

    def last_sequence(self, caller: Caller, job_id: str, last_event_id: str | None) -> int:
        """The number of the event after which a stream begins: that of `last_event_id`, or 0 if that is None.

        Raises `TooMany` if the caller's key has too many open streams.
        """
        self.feed.require_place(caller.key_id)
        with self.database.read() as session:
            self._require_job(session, caller.project, job_id)
            if last_event_id is None:
                return 0
            sequence = job_events.sequence_of(session, job_id, last_event_id)
        if sequence is None:
            raise no_such(f"event of this {self.KIND.noun}", last_event_id, code="event", param="Last-Event-ID")
        return sequence

    def logs(self, project: str, job_id: str) -> Iterator[bytes]:
        """The trainer's log of the latest attempt that has one; empty if none has."""
        with self.database.read() as session:
            last_attempt = self._require_job(session, project, job_id).attempt
        for attempt in range(last_attempt, 0, -1):
            try:
                return self.storage.chunks(log_key(job_id, attempt))
            except FileNotFoundError:
                continue
        return iter(())
