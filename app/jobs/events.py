"""All SQL about job events. Events of type `metrics` hold what a job measured."""

from collections.abc import Sequence
from itertools import chain, islice, takewhile

from sqlalchemy import delete, select, true, update
from sqlalchemy.orm import Session

from app.database import database_now, new_id
from app.jobs import event_blocks
from app.jobs.tables import EventBlock, Job, JobEvent
from app.pagination import keyset
from app.spec.json_types import JsonObject

FORGET_JOBS = 100
"""Maximum number of jobs whose events one transaction deletes."""
NO_EVENT = 2**63 - 1
"""A number after that of every event."""


def add(
    session: Session,
    job_id: str,
    message: str,
    *,
    level: str = "info",
    type: str = "message",
    data: JsonObject | None = None,
    id: str | None = None,
) -> None:
    """Append an event to the job, in the transaction of the change that it reports."""
    session.add(
        JobEvent(
            id=id or new_id("ftevent"),
            job_id=job_id,
            created_at=database_now(),
            level=level,
            type=type,
            message=message,
            data=data,
        )
    )
    session.flush()


def page(session: Session, job_id: str, *, after: str | None, limit: int) -> list[JobEvent] | None:
    """Up to `limit` + 1 events, newest first; None if `after` is not an event of this job."""
    after_event = None if after is None else _find(session, job_id, after)
    if after is not None and after_event is None:
        return None
    statement = select(JobEvent).where(JobEvent.job_id == job_id)
    events = list(session.scalars(keyset(statement, (JobEvent.sequence,), after_event, limit)))
    if len(events) <= limit:
        # Rows are read before blocks. So an event that is moved meanwhile is in both, and not in neither.
        oldest = events[-1] if events else after_event
        packed = event_blocks.before(session, job_id, NO_EVENT if oldest is None else oldest.sequence)
        events += islice(packed, limit + 1 - len(events))
    return events


def after(session: Session, job_id: str, sequence: int, limit: int) -> list[JobEvent]:
    """Up to `limit` events after number `sequence`, in order."""
    statement = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.sequence > sequence)
    rows = list(session.scalars(statement.order_by(JobEvent.sequence).limit(limit)))
    first_row = rows[0].sequence if rows else NO_EVENT
    packed = takewhile(lambda event: event.sequence < first_row, event_blocks.after(session, job_id, sequence))
    return list(islice(chain(packed, rows), limit))


def _find(session: Session, job_id: str, event_id: str) -> JobEvent | None:
    """An event of a job, by its id; None if it has no such event."""
    row = session.scalar(select(JobEvent).where(JobEvent.id == event_id, JobEvent.job_id == job_id))
    return row or event_blocks.find(session, job_id, event_id)


def forget(session: Session, seconds: float, limit: int) -> tuple[int, bool]:
    """Delete up to `limit` events of jobs that ended more than `seconds` ago.

    It goes from job to job, oldest first, and marks each whose events are all deleted. Returns the number of events,
    and whether there may be more.
    """
    ended = (Job.events_kept == true(), Job.finished_at < database_now() - seconds)
    job_ids = session.scalars(select(Job.id).where(*ended).order_by(Job.finished_at).limit(FORGET_JOBS)).all()
    forgotten = 0
    for job_id in job_ids:
        old = select(JobEvent.sequence).where(JobEvent.job_id == job_id).limit(limit - forgotten)
        statement = delete(JobEvent).where(JobEvent.sequence.in_(old)).returning(JobEvent.sequence)
        forgotten += len(session.scalars(statement).all())
        if forgotten >= limit:
            break
        session.execute(delete(EventBlock).where(EventBlock.job_id == job_id))
        session.execute(update(Job).where(Job.id == job_id).values(events_kept=False))
    return forgotten, bool(job_ids)


def any_of(session: Session, event_ids: Sequence[str]) -> bool:
    """Whether at least one of these events exists."""
    return session.scalar(select(JobEvent.sequence).where(JobEvent.id.in_(event_ids)).limit(1)) is not None


def sequence_of(session: Session, job_id: str, event_id: str) -> int | None:
    """The number of an event; None if the job has no such event."""
    event = _find(session, job_id, event_id)
    return None if event is None else event.sequence


def metrics(session: Session, job_id: str) -> Sequence[JsonObject]:
    """The data of each `metrics` event of a job, in order: `step`, `stage` and the metrics."""
    statement = select(JobEvent.sequence, JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "metrics")
    data = dict(session.execute(statement).all())
    packed = event_blocks.after(session, job_id, 0)
    data |= {event.sequence: event.data for event in packed if event.type == "metrics"}
    return [values for _, values in sorted(data.items()) if values]
