"""Forecast when the jobs in the queue will start and end.

The forecast simulates the queue: each GPU worker takes the next job that it serves as soon as enough of its devices are
free. A job of unknown duration occupies its devices for good. Jobs that only such workers could take get no times.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from app.broker import Lane
from app.database import now
from app.jobs import queries
from app.jobs import queue as job_queue
from app.jobs.queue import WaitingJob
from app.jobs.states import Status
from app.jobs.tables import Job
from app.operations import service as operations
from app.spec.resources import MOST_DEVICES
from app.workers import repository as workers
from app.workers.tables import Worker

OPERATOR = "the operator: workers start no jobs at present"
HORIZON = job_queue.READ_AT_ONCE
"""Number of jobs that are simulated. Jobs behind them get a position and no times."""


@dataclass(frozen=True)
class QueuePlace:
    """The place of a job: `position` counts from 1, times are Unix seconds. None means not known."""

    position: int | None = None
    start: float | None = None
    finish: float | None = None
    waiting_for: str | None = None
    """The need that keeps the job waiting, apart from the jobs before it."""


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
        ready = job_queue.ready(session, [job.id for job in waiting])
        places |= _simulate(session, current, ready)
        places |= {
            job.id: QueuePlace(waiting_for="the success of its training")
            for job in waiting
            if job.id not in ready and job.parent_id is not None
        }
        places |= {job.id: QueuePlace(waiting_for=job.awaits) for job in waiting if job.awaits is not None}
        stopped = operations.current(session)
        if stopped.claims_paused or stopped.read_only is not None:
            places |= {
                job.id: replace(places.get(job.id, QueuePlace()), start=None, finish=None, waiting_for=OPERATOR)
                for job in waiting
            }
        limits = job_queue.projects_at_limit(session, {job.project for job in waiting})
        for job in waiting:
            if job.project in limits and job.id in places and places[job.id].waiting_for is None:
                text = f"the end of a running job: the project may run {limits[job.project]} at a time"
                places[job.id] = replace(places[job.id], waiting_for=text)
    return places


def _finish(job: Job, current: float) -> float | None:
    """When a running job will end; None if nobody has measured or estimated it."""
    remaining = (job.progress or {}).get("seconds_remaining")
    if remaining is not None:
        return current + float(remaining)
    if job.estimated_seconds is None:
        return None
    return current + max(0.0, job.estimated_seconds - job.ran_seconds)


def _simulate(session: Session, current: float, wanted: Collection[str]) -> dict[str, QueuePlace]:
    """The places of the waiting jobs `wanted`, by id. Those of more than `HORIZON` jobs are not simulated."""
    present = workers.present(session, Lane.GPU)
    # When each device is free, by worker. One whose job has no known end is never free.
    free_at = {
        worker.name: [current] * (workers.devices_of(worker, MOST_DEVICES) or 1)
        for worker in present
        if workers.in_service(worker)
    }
    for running in queries.running(session):
        if running.lease_owner in free_at:
            finish = _finish(running, current)
            _occupy(free_at[running.lease_owner], running.devices or 1, math.inf if finish is None else finish)
    places: dict[str, QueuePlace] = {}
    for position, job in enumerate(job_queue.waiting(session), start=1):
        if len(places) == len(wanted):
            break
        place = _start(job, position, present, free_at) if position <= HORIZON else QueuePlace(position)
        if job.id in wanted:
            places[job.id] = place
    return places


def _occupy(free_at: list[float], devices: int, until: float) -> None:
    """Let a job occupy those devices of a worker that are free first."""
    free_at.sort()
    free_at[:devices] = [until] * len(free_at[:devices])
    free_at.sort()


def _start(job: WaitingJob, position: int, present: Sequence[Worker], free_at: dict[str, list[float]]) -> QueuePlace:
    """Start a job on the worker that can run it first.

    `free_at` has for each worker in service when each of its devices is free.
    """
    able = [
        worker.name for worker in present if len(free_at.get(worker.name, ())) >= job.devices and _can_run(worker, job)
    ]
    suits, start = bool(able), math.inf
    if able:
        first = min(able, key=lambda name: free_at[name][job.devices - 1])
        start = free_at[first][job.devices - 1]
        _occupy(free_at[first], job.devices, start + (math.inf if job.seconds is None else job.seconds))
    start_known = math.isfinite(start)
    finish = start + job.seconds if start_known and job.seconds is not None else None
    return QueuePlace(position, start if start_known else None, finish, None if suits else _obstacle(present, job))


def _can_run(worker: Worker, job: WaitingJob) -> bool:
    """Whether a worker knows the spec of a job, serves its models and has the devices and memory that it needs."""
    memory = workers.memory_of(worker)
    fits = job.memory_bytes is None or memory is None or job.memory_bytes <= memory
    devices = workers.devices_of(worker, job.nodes)
    enough = devices is None or job.devices <= devices
    return fits and enough and workers.serves(worker, *job.bases) and workers.knows(worker, job.spec_version)


def _obstacle(present: Sequence[Worker], job: WaitingJob) -> str:
    """The need of a job that no worker in service meets."""
    serving = [worker for worker in present if workers.serves(worker, *job.bases)]
    if not serving:
        return f"a GPU worker that serves {' and '.join(job.bases)}" if job.bases else "a GPU worker"
    knowing = [worker for worker in serving if workers.knows(worker, job.spec_version)]
    if not knowing:
        return "a GPU worker of a later version of this service"
    wide = [worker for worker in knowing if job.devices <= (workers.devices_of(worker, job.nodes) or job.devices)]
    if not wide:
        most = max(workers.devices_of(worker, job.nodes) or 0 for worker in knowing)
        where = "" if job.nodes == 1 else f" on at most {job.nodes} machines"
        return f"a worker with {job.devices} devices{where}; the largest has {most}"
    if job.memory_bytes is not None and not any(_can_run(worker, job) for worker in wide):
        largest = max(workers.memory_of(worker) or 0 for worker in wide)
        return f"a device with {job.memory_bytes / 1e9:.1f} GB of memory; the largest has {largest / 1e9:.1f} GB"
    return "a GPU worker whose device works: it is out of service"
