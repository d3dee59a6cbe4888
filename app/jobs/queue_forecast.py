"""When the jobs in the queue will start and end, as far as can be told.

The queue is played forward: each GPU worker that is there takes the next job it serves as soon as it is free. A job
whose own time is not known makes those behind it unknown too.
"""

import heapq
import math
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.broker import Lane
from app.database import now
from app.jobs import queries
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.jobs.tables import Job
from app.workers import repository as workers

HORIZON = 200
"""Jobs that are played forward; those behind them have a place and no times."""


@dataclass(frozen=True)
class QueuePlace:
    """Where a job stands: `position` from 1, and unix seconds; None is not known."""

    position: int | None = None
    start: float | None = None
    finish: float | None = None


def outlook(session: Session, jobs: list[Job]) -> dict[str, QueuePlace]:
    """The place of each of `jobs` that has not ended."""
    if not any(job.status in (Status.RUNNING, Status.QUEUED) for job in jobs):
        return {}
    time = now(session)
    places = {
        job.id: QueuePlace(None, job.started_at, _finish(job, time)) for job in jobs if job.status == Status.RUNNING
    }
    waiting = [job for job in jobs if job.status == Status.QUEUED and not job.paused]
    if waiting:
        queue = _played(session, time)
        places |= {job.id: queue[job.id] for job in waiting if job.id in queue}
        behind = [job.id for job in waiting if job.id not in queue]
        if behind:
            places |= {job_id: QueuePlace(at) for job_id, at in job_queue.positions(session, behind).items()}
    return places


def _finish(job: Job, now: float) -> float | None:
    remaining = (job.progress or {}).get("seconds_remaining")
    if remaining is not None:
        return now + float(remaining)
    if job.estimated_seconds is None:
        return None
    return now + max(0.0, job.estimated_seconds - job.ran_seconds)


def _played(session: Session, now: float) -> dict[str, QueuePlace]:
    """The places of the first jobs of the queue."""
    busy = {job.lease_owner: _finish(job, now) for job in queries.running(session)}
    present = workers.present(session, Lane.GPU)
    # When each worker is free; one whose job's end is not known is never free.
    free = [(busy.get(worker.name, now), number) for number, worker in enumerate(present)]
    heap = [(math.inf if at is None else at, number) for at, number in free]
    heapq.heapify(heap)
    places = {}
    for position, (job_id, bases, seconds) in enumerate(job_queue.waiting(session, HORIZON), start=1):
        passed = []
        start = math.inf
        while heap:
            at, number = heapq.heappop(heap)
            if workers.serves(present[number], *bases):
                start = at
                heapq.heappush(heap, (at + (math.inf if seconds is None else seconds), number))
                break
            passed.append((at, number))
        for entry in passed:
            heapq.heappush(heap, entry)
        known = math.isfinite(start)
        finish = start + seconds if known and seconds is not None else None
        places[job_id] = QueuePlace(position, start if known else None, finish)
    return places
