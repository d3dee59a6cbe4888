"""The queue of jobs: which one is next, who may start it, and who holds its lease."""

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from sqlalchemy import (
    ColumnElement,
    ScalarSelect,
    Select,
    String,
    bindparam,
    case,
    func,
    literal,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased
from sqlalchemy.sql.dml import ReturningUpdate

from app.database import database_now, now, wait_for_others
from app.errors import Forbidden
from app.jobs import events as job_events
from app.jobs import fair_share
from app.jobs.kinds import KINDS
from app.jobs.states import ACTIVE, Status
from app.jobs.tables import Job, OtherBase
from app.projects import repository as projects
from app.projects.tables import Project
from app.spec.version import SPEC_VERSION
from app.work_queue import OUTAGE_SECONDS, WorkQueue
from app.workers.repository import served_by

QUEUE_ORDER = (Job.priority.desc(), Job.created_at, Job.id)
"""The order of a project's jobs. `fair_share` orders the projects."""
JOBS = WorkQueue(
    Job,
    noun="job",
    active=Job.status.in_([Status.VALIDATING, Status.RUNNING]),
    order=(Job.project, *QUEUE_ORDER),
)
OTHER = aliased(Job)
"""Another job of the same project. It takes a millisecond to make an alias of so many columns, hence one for all."""
RESERVATION_SECONDS = 30.0
"""How long a worker keeps devices free for a job. It looks again every few seconds, and renews the reservation."""
CLAIM_LOCK = 0x64706F
"""Key of the advisory lock that claims take: an arbitrary number that nothing else uses."""


def _ready() -> ColumnElement[bool]:
    """The condition that a job waits for no other. An evaluation waits until its training, if any, has succeeded."""
    parent = aliased(Job)
    status = select(parent.status).where(parent.id == Job.parent_id).correlate(Job).scalar_subquery()
    return or_(Job.parent_id.is_(None), status == Status.SUCCEEDED)


WAITING = (Job.status == Status.QUEUED, Job.paused.is_(False), Job.awaits.is_(None), _ready())
WAITING_CANDIDATES = fair_share.candidates(QUEUE_ORDER, *WAITING)
READ_AT_ONCE = 200
"""Waiting jobs of a project that are read first. The rest is read if somebody asks for a place behind them."""


class WaitingJob(NamedTuple):
    """A job in the queue, and what a worker needs for it."""

    id: str
    project: str
    created_at: float
    bases: list[str]
    """The base models that the worker must serve."""
    memory_bytes: int | None
    """The memory that its device must have; None if that is not known."""
    seconds: float | None
    """Expected seconds of training; None if that is not known."""
    spec_version: int
    """The version of the spec that the worker must know."""
    devices: int
    """The fewest devices of one worker that it starts with."""
    nodes: int
    """The most machines that its devices may be on."""


def waiting(session: Session) -> Iterator[WaitingJob]:
    """The waiting jobs, next one first. Each counts as used GPU time of its project for those after it."""
    others = defaultdict[str, list[str]](list)
    waiting_for_others = select(OtherBase.job_id, OtherBase.base_model).join(Job, Job.id == OtherBase.job_id)
    for job_id, base in session.execute(waiting_for_others.where(*WAITING)):
        others[job_id].append(base)
    heap = []
    for share in fair_share.by_use(session, WAITING_CANDIDATES):
        line = _line(session, share.project, others)
        heap.append((share.turn(), share, next(line), line))
    while heap:
        _, share, job, line = heap[0]
        yield job
        share.seconds += job.devices * fair_share.expected_seconds(job.seconds)
        following = next(line, None)
        if following is None:
            heapq.heappop(heap)
        else:
            share.first_at = following.created_at
            heapq.heapreplace(heap, (share.turn(), share, following, line))


def _line(session: Session, project: str, others: Mapping[str, list[str]]) -> Iterator[WaitingJob]:
    """The waiting jobs of a project, next one first. `others` are the base models of each beside its own."""
    columns = (Job.id, Job.created_at, Job.base_model, Job.memory_bytes, Job.estimated_seconds, Job.spec_version)
    ordered = (
        select(*columns, Job.least_devices, Job.nodes).where(Job.project == project, *WAITING).order_by(*QUEUE_ORDER)
    )
    for statement in (ordered.limit(READ_AT_ONCE), ordered.offset(READ_AT_ONCE)):
        rows = session.execute(statement).all()
        for job_id, created_at, base, memory, seconds, version, devices, nodes in rows:
            bases = [*([base] if base else []), *others.get(job_id, [])]
            yield WaitingJob(job_id, project, created_at, bases, memory, seconds, version, devices, nodes)
        if len(rows) < READ_AT_ONCE:
            return


def count_waiting(session: Session, limit: int, project: str) -> int:
    """The number of waiting jobs of a project, at most `limit`."""
    waiting_ids = select(Job.id).where(*WAITING, Job.project == project).limit(limit)
    return session.scalars(select(func.count()).select_from(waiting_ids.subquery())).one()


def ready(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those of `job_ids` that wait for no other job."""
    return set(session.scalars(select(Job.id).where(Job.id.in_(job_ids), *WAITING)))


def require_place(session: Session, project_id: str, priority: int) -> None:
    """Raise `Forbidden` if a project may not have one more job in its queue, or none with that priority."""
    project = projects.get(session, project_id)
    if project is None:
        return
    if project.max_priority is not None and priority > project.max_priority:
        raise Forbidden(
            f"The project '{project_id}' may give a job a priority of at most {project.max_priority}. "
            "Lower 'priority', or ask the operator for a higher limit.",
            param="priority",
            code="priority_limit_reached",
        )
    if project.max_queued_jobs is None:
        return
    limit = projects.lock(session, project_id).max_queued_jobs  # two requests at once would both find a place
    queued = (Job.status.in_((Status.VALIDATING, Status.QUEUED)), Job.project == project_id, Job.awaits.is_(None))
    if limit is not None and session.scalars(select(func.count()).where(*queued)).one() >= limit:
        raise Forbidden(
            f"{limit} jobs of the project '{project_id}' wait already, and it may have no more. "
            "Try again when some have started, cancel some, or ask the operator for a higher limit.",
            code="queue_limit_reached",
        )


def projects_at_limit(session: Session, projects: Collection[str]) -> dict[str, int]:
    """The largest number of running jobs of each of `projects` that has reached it."""
    statement = select(Project.id, Project.max_running_jobs).where(
        Project.id.in_(projects), _running_jobs(Project.id) >= Project.max_running_jobs
    )
    return {project: limit for project, limit in session.execute(statement) if limit is not None}


def set_paused(session: Session, job_id: str, paused: bool) -> bool:
    """Pause a job or resume it; False if it has ended."""
    statement = update(Job).where(Job.id == job_id, Job.status.in_(ACTIVE)).values(paused=paused).returning(Job.id)
    return session.scalar(statement) is not None


class Devices(NamedTuple):
    """The devices of a worker: how many are free, and how many it has.

    Both are given for one machine, for two, and so on up to all machines: the most devices that are on so many.
    """

    free: tuple[int, ...]
    total: tuple[int, ...]


ONE_DEVICE = Devices((1,), (1,))


def claim(
    session: Session,
    status: Status,
    owner: str,
    served: Sequence[str] | None = None,
    memory_bytes: int | None = None,
    busy: Collection[str] = (),
    devices: Devices = ONE_DEVICE,
) -> Job | None:
    """Take the lease of the best eligible job with `status`; None if there is none, or if it needs more free devices.

    The project that goes next comes first: by fair share for a queued job, in turn for the check of files. Within a
    project, the highest priority comes first, then the oldest job. A queued job becomes running. `served` limits the
    claim of a queued job to base models that match these patterns (`*` matches anything), and `memory_bytes` to jobs
    that need no more memory. None allows any. Jobs of the projects `busy` are left alone.

    If the best queued job needs more devices than are free, but no more than the worker has, the worker reserves it:
    it claims nothing behind it until they are free. Other workers leave the job alone unless they can start it at once.
    So no job starves.
    """
    claiming = _claiming(status, None if served is None else tuple(served), memory_bytes, devices, owner)
    if claiming.any_queued is not None and session.scalar(claiming.any_queued) is None:
        return None
    if status == Status.QUEUED:
        turn = [share.project for share in fair_share.by_use(session, claiming.candidates)]
    else:
        turn = fair_share.by_last_check(session, claiming.candidates)
    turn = [project for project in turn if project not in busy]
    if not turn:
        return None  # most of those who look find nothing, and keep nobody waiting
    # Without the lock, two claims at once could exceed a project's limit. They may both have seen the same turn. Then
    # the next claims make up for it.
    wait_for_others(session, CLAIM_LOCK)
    for project in turn:
        # A request of the project may hold its row for a second, as a large sweep does. Other projects do not wait.
        checked = projects.try_lock(session, project) if status == Status.VALIDATING else None
        if status == Status.VALIDATING and checked is None:
            continue
        parameters = {"of_project": project, "claimed_by": owner, "on_worker": owner.partition(":")[0]}
        job = session.scalar(claiming.take, parameters)
        if job is None and devices.free < devices.total and session.scalar(claiming.reserve, parameters) is not None:
            return None
        if job is None:
            continue
        if checked is None:
            job_events.add(session, job.id, KINDS[job.kind].started)
        else:
            checked.checked_at = now(session)
        return job
    return None


class Claiming(NamedTuple):
    """The statements of a claim. They are kept, because SQLAlchemy needs longer to make them than a database to answer.

    - `any_queued` finds out whether a job is queued whose base model the worker serves; None if it serves all. An index
      answers it, however long the queue is.
    - `candidates` are the projects that have a job and may have one more begin.
    - `take` claims the first job of the project `of_project`, with the parameters `claimed_by` and `on_worker`.
    - `reserve` reserves the same job if it needs more devices than are free.
    """

    any_queued: Select[str] | None
    candidates: fair_share.Candidates
    take: ReturningUpdate[Job]
    reserve: ReturningUpdate[str]


@lru_cache(maxsize=64)
def _claiming(
    status: Status, served: tuple[str, ...] | None, memory_bytes: int | None, devices: Devices, owner: str
) -> Claiming:
    """The statements of a claim. The arguments are those of `claim`."""
    conditions = [*_claimable(status, served, memory_bytes), Job.spec_version <= SPEC_VERSION]
    free, total = _within_nodes(devices.free), _within_nodes(devices.total)
    fits = Job.least_devices <= free
    within_limit, of_project = _within_limit(status), bindparam("of_project", type_=String)
    any_queued, values = None, dict[str, object]()
    if served is not None:
        served_and_queued = (_base_is_served(served), Job.status == Status.QUEUED, Job.awaits.is_(None))
        any_queued = select(Job.id).where(*served_and_queued).limit(1)
    if status == Status.QUEUED:
        started = func.coalesce(Job.started_at, database_now())
        values = {"status": Status.RUNNING, "started_at": started, "worker": bindparam("on_worker")}
        taken = case((Job.most_devices < free, Job.most_devices), else_=free)
        values |= {"devices": taken, "reserved_by": None}
        # A reservation keeps a job from workers that would reserve it too, not from one that can start it now.
        seconds_left = Job.reserved_until - database_now()
        lapsed = or_(seconds_left < 0, seconds_left > 2 * RESERVATION_SECONDS)  # or a clock was set back
        conditions += [
            Job.least_devices <= total,
            or_(Job.reserved_by.is_(None), Job.reserved_by == owner, lapsed, fits),
        ]
    is_within = select(Project.id).where(Project.id == of_project, within_limit).exists()
    first = (Job.project == of_project, is_within, *conditions)
    return Claiming(
        any_queued,
        fair_share.candidates(QUEUE_ORDER, within_limit, *conditions, JOBS.free()),
        JOBS.claiming(*first, fits=fits if status == Status.QUEUED else None, **values),
        update(Job)
        .where(Job.id == JOBS.first(*first).scalar_subquery(), Job.least_devices > free)
        .values(reserved_by=owner, reserved_until=database_now() + RESERVATION_SECONDS)
        .returning(Job.id),
    )


def _within_nodes(devices: tuple[int, ...]) -> ColumnElement[int]:
    """The devices that a job may use, of those of `Devices`."""
    fewer = [(Job.nodes == count, literal(most)) for count, most in enumerate(devices[:-1], start=1)]
    return case(*fewer, else_=devices[-1]) if fewer else literal(devices[-1])


def _base_is_served(served: Sequence[str]) -> ColumnElement[bool]:
    return or_(Job.base_model == "", served_by(Job.base_model, served))


def _claimable(status: Status, served: Sequence[str] | None, memory_bytes: int | None) -> list[ColumnElement[bool]]:
    """The conditions of a job with `status` that a worker may claim, as in `claim`."""
    if status == Status.VALIDATING:
        return [Job.status == status]
    conditions = [*WAITING]
    if served is not None:
        unserved = select(OtherBase.job_id).where(
            OtherBase.job_id == Job.id, not_(served_by(OtherBase.base_model, served))
        )
        conditions += [_base_is_served(served), ~unserved.correlate(Job).exists()]
    if memory_bytes is not None:
        conditions.append(or_(Job.memory_bytes.is_(None), Job.memory_bytes <= memory_bytes))
    return conditions


def _within_limit(status: Status) -> ColumnElement[bool]:
    """The condition that a project may have one more job taken from `status`. It may always check one job's files."""
    limit = Project.max_running_jobs
    if status == Status.QUEUED:
        return or_(limit.is_(None), _running_jobs(Project.id) < limit)
    checking = select(func.count()).where(
        OTHER.project == Project.id, OTHER.status == Status.VALIDATING, OTHER.lease_owner.is_not(None)
    )
    checks = checking.correlate(Project).scalar_subquery()
    return or_(limit.is_(None), checks < limit, checks == 0)


def _running_jobs(project: InstrumentedAttribute[str]) -> ScalarSelect[int]:
    """The number of running jobs of the project that a column names, in each row of the column's table."""
    count = select(func.count()).where(OTHER.project == project, OTHER.status == Status.RUNNING)
    return count.correlate(project.class_).scalar_subquery()


@dataclass(frozen=True)
class LeaseState:
    """The state of a job after a heartbeat has renewed its lease."""

    paused: bool
    ran_seconds: float


def heartbeat(session: Session, job_id: str, attempt: int, *, counts: bool = True) -> LeaseState | None:
    """Extend the lease; None if this attempt no longer holds it.

    The `ran_seconds` of a running job grow by the time since the last heartbeat if that time `counts`.
    """
    passed = database_now() - (Job.lease_expires_at - JOBS.lease_seconds)
    # Two heartbeats are at most this far apart. A longer or negative time means that the clock was changed.
    plausible = case((passed.between(0.0, JOBS.lease_seconds + OUTAGE_SECONDS), passed), else_=0.0)
    ran = case((Job.status == Status.RUNNING, plausible), else_=0.0)
    ran_seconds = Job.ran_seconds + (ran if counts else 0.0)
    row = JOBS.heartbeat(session, job_id, attempt, Job.paused, Job.ran_seconds, ran_seconds=ran_seconds)
    return None if row is None else LeaseState(*row)
