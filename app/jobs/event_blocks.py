"""Blocks of events: the events of ended jobs, compressed.

A training writes an event in each step, and nobody changes or looks up a single one once the job has ended. In a block,
an event takes a fifth of the space of a row and its indexes. `app.jobs.events` reads rows and blocks as one.
"""

import json
import zlib
from collections.abc import Iterator, Sequence

from sqlalchemy import delete, false, select, update
from sqlalchemy.orm import Session

from app.database import database_now
from app.jobs.tables import EventBlock, Job, JobEvent

BLOCK_EVENTS = 1000
"""Maximum number of events in a block."""
SETTLED_SECONDS = 3600.0
"""Time after its end in which a job's events stay rows. Those who followed the job read the last ones by then."""
FIELDS = ("id", "created_at", "level", "type", "message", "data")


def pack(session: Session) -> bool:
    """Move the next events of an ended job from rows to a block. Returns whether there may be more to move."""
    settled = (Job.events_packed == false(), Job.finished_at < database_now() - SETTLED_SECONDS)
    oldest = select(Job.id).where(*settled).order_by(Job.finished_at).limit(1)
    job_id = session.scalar(oldest.with_for_update(skip_locked=True))
    if job_id is None:
        return False
    rows = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence).limit(BLOCK_EVENTS)
    events = session.scalars(rows).all()
    if events:
        session.add(_block(job_id, events))
        session.execute(delete(JobEvent).where(JobEvent.sequence.in_([event.sequence for event in events])))
    if len(events) < BLOCK_EVENTS:
        session.execute(update(Job).where(Job.id == job_id).values(events_packed=True))
    return True


def _block(job_id: str, events: Sequence[JobEvent]) -> EventBlock:
    """A block of a job's `events`, which are in the order of their sequence."""
    content = json.dumps([[event.sequence, *(getattr(event, name) for name in FIELDS)] for event in events])
    return EventBlock(
        job_id=job_id,
        first_sequence=events[0].sequence,
        last_sequence=events[-1].sequence,
        ids="".join(f"{event.id} " for event in events),
        content=zlib.compress(content.encode()),
    )


def events_of(block: EventBlock) -> list[JobEvent]:
    """The events of a block, in the order of their sequence. They belong to no session."""
    return [
        JobEvent(job_id=block.job_id, sequence=sequence, **dict(zip(FIELDS, values, strict=True)))
        for sequence, *values in json.loads(zlib.decompress(block.content))
    ]


def find(session: Session, job_id: str, event_id: str) -> JobEvent | None:
    """An event of a job, by its id; None if no block has it."""
    has_it = (EventBlock.job_id == job_id, EventBlock.ids.contains(f"{event_id} ", autoescape=True))
    block = session.scalar(select(EventBlock).where(*has_it))
    return next((event for event in events_of(block) if event.id == event_id), None) if block is not None else None


def before(session: Session, job_id: str, sequence: int) -> Iterator[JobEvent]:
    """The events of a job before number `sequence`, newest first. Blocks are read one by one."""
    while True:
        earlier = (EventBlock.job_id == job_id, EventBlock.first_sequence < sequence)
        block = session.scalar(select(EventBlock).where(*earlier).order_by(EventBlock.first_sequence.desc()).limit(1))
        if block is None:
            return
        yield from (event for event in reversed(events_of(block)) if event.sequence < sequence)
        sequence = block.first_sequence


def after(session: Session, job_id: str, sequence: int) -> Iterator[JobEvent]:
    """The events of a job after number `sequence`, in order. Blocks are read one by one."""
    while True:
        later = (EventBlock.job_id == job_id, EventBlock.last_sequence > sequence)
        block = session.scalar(select(EventBlock).where(*later).order_by(EventBlock.first_sequence).limit(1))
        if block is None:
            return
        yield from (event for event in events_of(block) if event.sequence > sequence)
        sequence = block.last_sequence
