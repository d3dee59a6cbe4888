"""All SQL about jobs: what callers may read, the transitions of the state machine, and leases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import ColumnElement, Row, Select, and_, case, delete, false, func, not_, or_, select, tuple_, update
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from app.database import database_now, new_id, wait_for_others
from app.jobs.states import ACTIVE, TRANSITIONS, Actor, Status
from app.jobs.tables import EVALUATION, TRAINING, Checkpoint, Job, JobEvent, OtherBase
from app.projects.tables import Project
from app.spec import quality_gates
from app.spec.evaluation import EvaluationSpec
from app.spec.job import JobSpec
from app.spec.quality_gates import Verdict
from app.webhooks import repository as webhooks

LEASE_SECONDS = 15.0
HEARTBEAT_SECONDS = 3.0
OUTAGE_SECONDS = 60.0
"""So much longer than its lease a worker trains on while the database does not answer it."""
MAX_LOST_ATTEMPTS = 3
MAX_CHECKPOINTS = 1000
RETRY_SECONDS = 20.0
CLAIM_LOCK = 0x64706F
"""Any number that nobody else uses."""


_LEASED = (Job.status.in_([Status.VALIDATING, Status.RUNNING]), Job.lease_owner.is_not(None))


def readable(project: str, kind: str = TRAINING) -> Select[Job]:
    """The jobs of a kind that `project` may see."""
    return select(Job).where(Job.project == project, Job.kind == kind)


def get(session: Session, project: str, job_id: str, kind: str = TRAINING) -> Job | None:
    return session.scalar(readable(project, kind).where(Job.id == job_id))


def now(session: Session) -> float:
    """The database's clock, in unix seconds."""
    return session.scalars(select(database_now())).one()


def page(
    session: Session, project: str, *, after: Job | None, limit: int, metadata: dict[str, str], kind: str = TRAINING
) -> list[Job]:
    """Up to `limit` + 1 jobs, newest first, those older than `after` whose metadata hold `metadata`."""
    statement = readable(project, kind)
    for key, value in metadata.items():
        statement = statement.where(Job.job_metadata[key].as_string() == value)
    if after is not None:
        statement = statement.where(tuple_(Job.created_at, Job.id) < tuple_(after.created_at, after.id))
    statement = statement.order_by(Job.created_at.desc(), Job.id.desc())
    return list(session.scalars(statement.limit(limit + 1)))


QUEUE_ORDER = (Job.priority.desc(), Job.created_at, Job.id)


def _ready() -> ColumnElement[bool]:
    """Whether what a job waits for is there: an evaluation of a model, once its training has succeeded."""
    parent = aliased(Job)
    status = select(parent.status).where(parent.id == Job.parent_id).correlate(Job).scalar_subquery()
    return or_(Job.parent_id.is_(None), status == Status.SUCCEEDED)


WAITING = (Job.status == Status.QUEUED, Job.paused.is_(False), _ready())


def queue(session: Session, limit: int) -> list[tuple[str, list[str], float | None]]:
    """(id, base models, expected seconds of training) of the first `limit` jobs that wait, the next one first."""
    statement = select(Job.id, Job.base_model, Job.estimated_seconds).where(*WAITING)
    found = session.execute(statement.order_by(*QUEUE_ORDER).limit(limit)).all()
    bases = {job_id: [base] if base else [] for job_id, base, _ in found}
    others = select(OtherBase.job_id, OtherBase.base_model).where(OtherBase.job_id.in_(bases))
    for job_id, base in session.execute(others):
        bases[job_id].append(base)
    return [(job_id, bases[job_id], seconds) for job_id, _, seconds in found]


def queue_positions(session: Session, job_ids: Sequence[str]) -> dict[str, int]:
    """The places in the queue of those of `job_ids` that wait; 1 starts next."""
    number = func.row_number().over(order_by=QUEUE_ORDER).label("position")
    places = select(Job.id, number).where(*WAITING).subquery()
    found = session.execute(select(places.c.id, places.c.position).where(places.c.id.in_(job_ids)))
    return dict(found.all())


def running(session: Session) -> Sequence[Job]:
    """All jobs that train now."""
    return session.scalars(select(Job).where(Job.status == Status.RUNNING)).all()


def paces(session: Session, base_model: str, limit: int) -> Sequence[Job]:
    """The last jobs that succeeded on `base_model` and measured their pace."""
    statement = select(Job).where(Job.status == Status.SUCCEEDED, Job.base_model == base_model, Job.pace.is_not(None))
    return session.scalars(statement.order_by(Job.finished_at.desc()).limit(limit)).all()


def set_paused(session: Session, job_id: str, paused: bool) -> bool:
    """Hold a job back, or let it go on; False where it has ended."""
    statement = update(Job).where(Job.id == job_id, Job.status.in_(ACTIVE)).values(paused=paused).returning(Job.id)
    return session.scalar(statement) is not None


def add_event(
    session: Session,
    job_id: str,
    message: str,
    *,
    level: str = "info",
    type: str = "message",
    data: dict[str, Any] | None = None,
    id: str | None = None,
) -> None:
    """Append to the job's events, in the transaction of what it tells."""
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


def events(session: Session, job_id: str, *, after: str | None, limit: int) -> list[JobEvent] | None:
    """Up to `limit` + 1 events, newest first; None where `after` is not an event of this job."""
    statement = select(JobEvent).where(JobEvent.job_id == job_id)
    if after is not None:
        mark = sequence_of(session, job_id, after)
        if mark is None:
            return None
        statement = statement.where(JobEvent.sequence < mark)
    return list(session.scalars(statement.order_by(JobEvent.sequence.desc()).limit(limit + 1)))


def events_after(session: Session, job_id: str, seen: int, limit: int) -> list[JobEvent]:
    """Up to `limit` events after number `seen`, in their order."""
    statement = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.sequence > seen)
    return list(session.scalars(statement.order_by(JobEvent.sequence).limit(limit)))


def forget_events(session: Session, seconds: float, limit: int) -> int:
    """Remove up to `limit` events of jobs that ended more than `seconds` ago; returns how many."""
    ended = select(Job.id).where(Job.finished_at < database_now() - seconds)
    old = select(JobEvent.sequence).where(JobEvent.job_id.in_(ended)).order_by(JobEvent.sequence).limit(limit)
    return len(session.scalars(delete(JobEvent).where(JobEvent.sequence.in_(old)).returning(JobEvent.sequence)).all())


def any_event(session: Session, event_ids: Sequence[str]) -> bool:
    """Whether one of these events is there."""
    return session.scalar(select(JobEvent.sequence).where(JobEvent.id.in_(event_ids)).limit(1)) is not None


def sequence_of(session: Session, job_id: str, event_id: str) -> int | None:
    """The number of an event of a job."""
    return session.scalar(select(JobEvent.sequence).where(JobEvent.id == event_id, JobEvent.job_id == job_id))


def metrics(session: Session, job_id: str) -> Sequence[dict[str, Any]]:
    """What each measuring event of a job says, in order: `step`, `stage` and the metrics."""
    statement = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "metrics")
    return [data for data in session.scalars(statement.order_by(JobEvent.sequence)) if data]


def checkpoints(session: Session, job_id: str, *, after: str | None, limit: int) -> list[Checkpoint] | None:
    """Up to `limit` + 1 checkpoints, latest step first; None where `after` is not one of this job."""
    statement = select(Checkpoint).where(Checkpoint.job_id == job_id)
    if after is not None:
        mark = session.scalar(select(Checkpoint.step_number).where(Checkpoint.id == after, Checkpoint.job_id == job_id))
        if mark is None:
            return None
        statement = statement.where(Checkpoint.step_number < mark)
    return list(session.scalars(statement.order_by(Checkpoint.step_number.desc()).limit(limit + 1)))


def left_by(session: Session, job_id: str, stage: str) -> Checkpoint | None:
    """The last checkpoint of a stage, once one of a later stage shows that it has ended: what it left."""
    statement = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step_number.desc())
    found = list(session.scalars(statement))
    if not found or found[0].stage == stage:
        return None
    return next((one for one in found if one.stage == stage), None)


def stage_of(session: Session, model: str) -> str | None:
    """The stage that a checkpoint is of; None for what is no checkpoint."""
    return session.scalar(select(Checkpoint.stage).where(Checkpoint.model_name == model))


def move_checkpoint(session: Session, job_id: str, step: int, prefix: str) -> bool:
    """Let the job's checkpoint of `step` be the one under `prefix`; False where there is none of that step."""
    which = (Checkpoint.job_id == job_id, Checkpoint.step_number == step)
    return session.scalar(update(Checkpoint).where(*which).values(prefix=prefix).returning(Checkpoint.id)) is not None


def hold_checkpoints(session: Session, checkpoint_ids: Sequence[str]) -> None:
    """Let nobody begin to use these checkpoints until this transaction ends."""
    which = Checkpoint.id.in_(checkpoint_ids)
    session.execute(select(Checkpoint.id).where(which).order_by(Checkpoint.id).with_for_update())


def forget_checkpoints(session: Session, checkpoint_ids: Sequence[str]) -> None:
    """Remove the rows of checkpoints."""
    session.execute(delete(Checkpoint).where(Checkpoint.id.in_(checkpoint_ids)))


def transition(
    session: Session,
    job_id: str,
    source: Status,
    target: Status,
    *,
    actor: Actor,
    message: str,
    attempt: int | None = None,
    level: str = "info",
    **values: Any,
) -> bool:
    """Take one edge of the state machine and write its event; False where the job is not there any more.

    The row is changed only while it still has the status `source` and, on a fenced edge, the same `attempt`:
    a stale worker's write touches no row. Raises `ValueError` for an edge, actor or column that the table of
    `states.py` does not allow.
    """
    edge = TRANSITIONS.get((source, target))
    if edge is None or actor not in edge.actors:
        raise ValueError(f"{actor} may not take a job from {source} to {target}")
    if edge.fenced and attempt is None:
        raise ValueError(f"{source} to {target} needs the attempt that holds the lease")
    if unknown := set(values) - edge.writes:
        raise ValueError(f"{source} to {target} does not write {sorted(unknown)}")
    written: dict[str, Any] = dict(values)
    if "lease_owner" in edge.writes and "lease_owner" not in values:
        written |= {"lease_owner": None, "lease_expires_at": None}
    if "finished_at" in edge.writes:
        written |= {"finished_at": database_now()}
        if target != Status.SUCCEEDED:
            written |= {"progress": None}
    statement = update(Job).where(Job.id == job_id, Job.status == source)
    if attempt is not None:
        statement = statement.where(holds(job_id, attempt))
    job = session.scalar(
        statement.values(status=target, **written).returning(Job).execution_options(populate_existing=True)
    )
    if job is None:
        return False
    add_event(session, job_id, message, level=level)
    if target not in ACTIVE:
        data: dict[str, Any] = {"id": job_id}
        if job.gates:
            data["gates"] = job.gates
        named = "fine_tuning.job" if job.kind == TRAINING else EVALUATION
        webhooks.enqueue(session, job.project, f"{named}.{target}", data)
        if job.parent_id is not None:
            _settle(session, job.parent_id)
    return True


def judged(session: Session, job: Job, metrics: dict[str, float]) -> list[Verdict]:
    """The gates of a training with their verdicts, as far as its evaluations are; `metrics` are its own."""
    measured, pending = dict(metrics), []
    names = {evaluation_id: name for name, evaluation_id in (job.evaluations or {}).items()}
    for child in session.scalars(select(Job).where(Job.parent_id == job.id)):
        prefix = f"evaluations/{names[child.id]}/"
        if child.status in ACTIVE:
            pending.append(prefix)
        measured |= {prefix + name: value for name, value in (child.metrics or {}).items()}
    return quality_gates.judge(JobSpec.stored(job.spec).gates or [], measured, pending)


def _settle(session: Session, job_id: str) -> None:
    """Judge the gates of a training that has succeeded again: one of its evaluations has ended."""
    if session.scalar(select(Job.status).where(Job.id == job_id)) in (Status.FAILED, Status.CANCELLED):
        return
    # Locked: of two evaluations that end at once the second sees the first, and the training does not end meanwhile.
    locked = select(Job).where(Job.id == job_id).with_for_update().execution_options(populate_existing=True)
    job = session.scalars(locked).one()
    if job.status != Status.SUCCEEDED or not job.gates:
        return
    before, job.gates = job.gates, judged(session, job, job.metrics or {})
    if any(one["met"] is None for one in before) and all(one["met"] is not None for one in job.gates):
        add_event(session, job_id, quality_gates.summary(job.gates), level=quality_gates.level(job.gates))
        webhooks.enqueue(session, job.project, "fine_tuning.job.judged", {"id": job_id, "gates": job.gates})


def orphans(session: Session) -> Sequence[Job]:
    """Evaluations that wait for a training that will make no model."""
    parent = aliased(Job)
    gone = select(parent.id).where(parent.id == Job.parent_id, parent.status.in_((Status.FAILED, Status.CANCELLED)))
    return session.scalars(select(Job).where(Job.status.in_(ACTIVE), gone.exists())).all()


def claim(session: Session, status: Status, owner: str, served: Sequence[str] | None = None) -> Job | None:
    """Take the lease of the best eligible job with `status`, in one statement; None if there is none.

    Priority first, then age. `served` holds patterns of base models (`*` matches anything); None takes any.
    A claim is a new attempt. A queued job is running from then on.
    """
    target = Status.RUNNING if status == Status.QUEUED else status
    free = and_(Job.status == status, Job.lease_owner.is_(None), eligible(Job.eligible_at))
    if target == Status.RUNNING:
        wait_for_others(session, CLAIM_LOCK)  # two that count a project's running jobs at once would both start one
        free = and_(free, Job.paused.is_(False), _ready(), _within_limit())
    best = select(Job.id).where(free)
    if served is not None:
        lacking = select(OtherBase.job_id).where(
            OtherBase.job_id == Job.id, not_(_served(OtherBase.base_model, served))
        )
        best = best.where(or_(Job.base_model == "", _served(Job.base_model, served)), ~lacking.correlate(Job).exists())
    best = best.order_by(Job.priority.desc(), Job.created_at, Job.id).limit(1)
    statement = (
        update(Job)
        .where(Job.id == best.with_for_update(skip_locked=True).scalar_subquery(), free)
        .values(
            status=target,
            attempt=Job.attempt + 1,
            started_at=func.coalesce(Job.started_at, database_now()) if target == Status.RUNNING else None,
            lease_owner=owner,
            lease_expires_at=database_now() + LEASE_SECONDS,
        )
        .returning(Job)
        .execution_options(populate_existing=True)
    )
    job = session.scalar(statement)
    if job is not None and target == Status.RUNNING:
        add_event(session, job.id, "Fine-tuning job started." if job.kind == TRAINING else "Evaluation started.")
    return job


def _within_limit() -> ColumnElement[bool]:
    """Whether the job's project may have one more job running."""
    other = aliased(Job)
    limit = select(Project.max_running_jobs).where(Project.id == Job.project).correlate(Job).scalar_subquery()
    count = (
        select(func.count())
        .where(other.project == Job.project, other.status == Status.RUNNING)
        .correlate(Job)
        .scalar_subquery()
    )
    return or_(limit.is_(None), count < limit)


def _served(column: Any, patterns: Sequence[str]) -> ColumnElement[bool]:
    return or_(false(), *(serves(column, name) for name in patterns))


def serves(column: Any, name: str) -> ColumnElement[bool]:
    """The condition that the base model in `column` is `name`, or fits it where that is a pattern."""
    if "*" not in name:
        return cast(ColumnElement[bool], column == name)
    for special in ("\\", "%", "_"):
        name = name.replace(special, "\\" + special)
    return cast(ColumnElement[bool], column.like(name.replace("*", "%"), escape="\\"))


def eligible(at: ColumnElement[float] | InstrumentedAttribute[float]) -> ColumnElement[bool]:
    """The condition that the time `at` has come; one further away than any pause was set before the clock went back."""
    return or_(at <= database_now(), at > database_now() + RETRY_SECONDS + HEARTBEAT_SECONDS)


def lapsed(expires_at: InstrumentedAttribute[float | None]) -> ColumnElement[bool]:
    """The condition that a lease is over. One that ends later than any could was set before the clock went back."""
    return or_(
        expires_at.is_(None),
        expires_at < database_now(),
        expires_at > database_now() + LEASE_SECONDS + HEARTBEAT_SECONDS,
    )


def holds(job_id: str, attempt: int) -> ColumnElement[bool]:
    """The condition that this attempt still holds the job's lease."""
    return and_(Job.id == job_id, Job.attempt == attempt, Job.lease_owner.is_not(None))


@dataclass(frozen=True)
class Held:
    """What a heartbeat learns of the job whose lease it renewed."""

    paused: bool
    ran_seconds: float


def heartbeat(session: Session, job_id: str, attempt: int) -> Held | None:
    """Extend the lease; None where another has it, or nobody. The time since the last heartbeat counts as trained."""
    passed = database_now() - (Job.lease_expires_at - LEASE_SECONDS)
    # Between two heartbeats no more can have passed; what is more is the clock, which was set.
    since = case((passed.between(0.0, LEASE_SECONDS + OUTAGE_SECONDS), passed), else_=0.0)
    statement = (
        update(Job)
        .where(holds(job_id, attempt))
        .values(
            lease_expires_at=database_now() + LEASE_SECONDS,
            ran_seconds=Job.ran_seconds + case((Job.status == Status.RUNNING, since), else_=0.0),
        )
        .returning(Job.paused, Job.ran_seconds)
    )
    row = session.execute(statement).one_or_none()
    return None if row is None else Held(*row)


def write_guarded(session: Session, job_id: str, attempt: int, **values: Any) -> bool:
    """Write columns of a job whose lease this attempt holds; False where it does not."""
    statement = update(Job).where(holds(job_id, attempt)).values(**values).returning(Job.id)
    return session.scalar(statement) is not None


def leases(session: Session) -> Sequence[Row[str, int, float | None]]:
    """(id, attempt, end) of every lease of a job that someone holds."""
    return session.execute(select(Job.id, Job.attempt, Job.lease_expires_at).where(*_LEASED)).all()


def expired(session: Session) -> list[Job]:
    """Jobs whose worker stopped renewing its lease."""
    statement = select(Job).where(*_LEASED, lapsed(Job.lease_expires_at))
    return list(session.scalars(statement.with_for_update(skip_locked=True)))


def recover(session: Session, job: Job, actor: Actor, reason: str) -> None:
    """Let another attempt go on with a job whose worker or trainer died; fail it when that keeps happening.

    Only attempts without a checkpoint since the last one count.
    """
    lost = job.lost_attempts + 1
    status, pause = Status(job.status), RETRY_SECONDS ** (lost - 1)  # 1 s, then 20 s: most outages are short
    if lost >= MAX_LOST_ATTEMPTS:
        message = (
            f"{reason} This happened {lost} times without progress, so the job was given up. "
            "This is a fault of the service or its machines, not of the job's data."
        )
        transition(
            session,
            job.id,
            status,
            Status.FAILED,
            actor=actor,
            attempt=job.attempt,
            message=message,
            level="error",
            error={"code": "worker_lost", "message": message, "param": None},
        )
    elif status == Status.RUNNING:
        transition(
            session,
            job.id,
            Status.RUNNING,
            Status.QUEUED,
            actor=actor,
            attempt=job.attempt,
            message=f"{reason} The job will resume.",
            level="warn",
            lost_attempts=lost,
            eligible_at=database_now() + pause,
        )
    elif write_guarded(
        session,
        job.id,
        job.attempt,
        lease_owner=None,
        lease_expires_at=None,
        lost_attempts=lost,
        eligible_at=database_now() + pause,
    ):
        add_event(session, job.id, f"{reason} The files will be checked again.", level="warn")


def files_of(job: Job) -> list[str]:
    """Ids of the files that a job reads."""
    if job.kind == EVALUATION:
        return [name for _, name in EvaluationSpec.stored(job.spec).files()]
    parts = (job.spec, job.spec["sft"] or {})
    named = [part.get(field) for part in parts for field in ("training_file", "validation_file")]
    return [name for name in [*named, *(job.spec.get("more_training_files") or [])] if name is not None]


def active_files(session: Session) -> set[str]:
    """Ids of the files that unfinished jobs read."""
    return {name for job in session.scalars(select(Job).where(Job.status.in_(ACTIVE))) for name in files_of(job)}


def users_of(session: Session, model: str) -> list[str]:
    """Ids of the unfinished jobs that start from a model, are held to it, sit on it, or evaluate it."""

    def others(job: Job) -> list[Any]:
        if job.kind == EVALUATION:
            return [name for _, name in EvaluationSpec.stored(job.spec).models()]
        return [((job.spec["method"].get("dpo") or {}).get("hyperparameters") or {}).get("reference_model")]

    unfinished = session.scalars(select(Job).where(Job.status.in_(ACTIVE)))
    return [job.id for job in unfinished if model in (job.model, job.foundation, *others(job))]
