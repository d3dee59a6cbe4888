"""Forecast when the jobs in the queue will start and end.

The forecast simulates the queue: each GPU worker takes the next job that it serves as soon as it is free. A job of
unknown duration occupies its worker for good. Jobs that only such workers could take get no times.
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
"""Number of jobs that are simulated. Jobs behind them get a position and no times."""


@dataclass(frozen=True)
class QueuePlace:
    """The place of a job: `position` counts from 1, times are Unix seconds. None means not known."""

    position: int | None = None
    start: float | None = None
    finish: float | None = None


def forecast(session: Session, jobs: list[Job]) -> dict[str, QueuePlace]:
    """The place of each job of `jobs` that is running or waits in the queue, by job id."""
    if not any(job.status in (Status.RUNNING, Status.QUEUED) for job in jobs):
        return {}
    current = now(session)
    places = {
        job.id: QueuePlace(None, job.started_at, _finish(job, current)) for job in jobs if job.status == Status.RUNNING
    }
    waiting = [job for job in jobs if job.status == Status.QUEUED and not job.paused]
    if waiting:
        queue = _simulate(session, current)
        places |= {job.id: queue[job.id] for job in waiting if job.id in queue}
        behind = [job.id for job in waiting if job.id not in queue]
        if behind:
            positions = job_queue.positions(session, behind)
            places |= {job_id: QueuePlace(position) for job_id, position in positions.items()}
    return places


def _finish(job: Job, current: float) -> float | None:
    """When a running job will end; None if nobody has measured or estimated it."""
    remaining = (job.progress or {}).get("seconds_remaining")
    if remaining is not None:
        return current + float(remaining)
    if job.estimated_seconds is None:
        return None
    return current + max(0.0, job.estimated_seconds - job.ran_seconds)


def _simulate(session: Session, current: float) -> dict[str, QueuePlace]:
    """The places of the first `HORIZON` jobs of the queue, by job id."""
    finish_by_worker = {job.lease_owner: _finish(job, current) for job in queries.running(session)}
    present = [worker for worker in workers.present(session, Lane.GPU) if workers.in_service(worker)]
    # (when the worker is free, its index). A worker whose job has no known end is never free.
    free = [(finish_by_worker.get(worker.name, current), index) for index, worker in enumerate(present)]
    heap = [(math.inf if free_at is None else free_at, index) for free_at, index in free]
    heapq.heapify(heap)
    places = {}
    for position, (job_id, bases, seconds) in enumerate(job_queue.waiting(session, HORIZON), start=1):
        unsuitable = []
        start = math.inf
        while heap:
            free_at, index = heapq.heappop(heap)
            if workers.serves(present[index], *bases):
                start = free_at
                heapq.heappush(heap, (free_at + (math.inf if seconds is None else seconds), index))
                break
            unsuitable.append((free_at, index))
        for entry in unsuitable:
            heapq.heappush(heap, entry)
        start_known = math.isfinite(start)
        finish = start + seconds if start_known and seconds is not None else None
        places[job_id] = QueuePlace(position, start if start_known else None, finish)
    return places
