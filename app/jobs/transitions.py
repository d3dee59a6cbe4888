"""Take an edge of the state machine. The event, the webhook and the gates of a training follow from it."""

from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app.database import database_now
from app.jobs import checkpoints as job_checkpoints
from app.jobs import events as job_events
from app.jobs import fair_share
from app.jobs.kinds import KINDS, TRAINING_JOB
from app.jobs.queue import JOBS
from app.jobs.states import ACTIVE, TRANSITIONS, Actor, Status
from app.jobs.tables import Checkpoint, Job, JobInput
from app.spec import quality_gates
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.quality_gates import Verdict
from app.webhooks import repository as webhooks
from app.work_queue import MAX_LOST_ATTEMPTS, retry_pause, setback_pause


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
    **values: object,
) -> bool:
    """Take one edge of the state machine and write its event; False if the job has left `source`.

    The write changes the row only if it still has the status `source`. With `attempt`, that attempt must also hold
    the lease, so a stale worker changes nothing. Raises `ValueError` for an edge, an actor or a column that the table
    in `states.py` does not allow.
    """
    edge = TRANSITIONS.get((source, target))
    if edge is None or actor not in edge.actors:
        raise ValueError(f"{actor} may not take a job from {source} to {target}")
    if edge.fenced and attempt is None:
        raise ValueError(f"{source} to {target} needs the attempt that holds the lease")
    if unknown := set(values) - edge.writes:
        raise ValueError(f"{source} to {target} does not write {sorted(unknown)}")
    written: dict[str, object] = dict(values)
    if "lease_owner" in edge.writes and "lease_owner" not in values:
        written |= {"lease_owner": None, "lease_expires_at": None}
    if "finished_at" in edge.writes:
        written |= {"finished_at": database_now()}
        if target != Status.SUCCEEDED:
            written |= {"progress": None}
    statement = update(Job).where(Job.id == job_id, Job.status == source)
    if attempt is not None:
        statement = statement.where(JOBS.holds(job_id, attempt))
    job = session.scalar(
        statement.values(status=target, **written).returning(Job).execution_options(populate_existing=True)
    )
    if job is None:
        return False
    job_events.add(session, job_id, message, level=level)
    if source == Status.RUNNING:
        fair_share.count_use(session, job, (job.trained_tokens or 0) if target == Status.SUCCEEDED else 0)
    if target not in ACTIVE:
        session.execute(delete(JobInput).where(JobInput.job_id == job_id))
        job_checkpoints.note_state_deleted(session, Checkpoint.job_id == job_id)  # nobody will resume the job
        data: JsonObject = {"id": job_id}
        if job.gates:
            data["gates"] = job.gates
        webhooks.enqueue(session, job.project, f"{KINDS[job.kind].webhook}.{target}", data)
        if job.parent_id is not None:
            _judge_again(session, job.parent_id)
    return True


def judge_gates(session: Session, job: Job, metrics: dict[str, float]) -> list[Verdict]:
    """Judge the gates of a training by its own `metrics` and by those that its evaluations have measured so far."""
    measured, pending = dict(metrics), []
    names = {evaluation_id: name for name, evaluation_id in (job.evaluations or {}).items()}
    for child in session.scalars(select(Job).where(Job.parent_id == job.id)):
        prefix = f"evaluations/{names[child.id]}/"
        if child.status in ACTIVE:
            pending.append(prefix)
        measured |= {prefix + name: value for name, value in (child.metrics or {}).items()}
    return quality_gates.judge(JobSpec.stored(job.spec).gates or [], measured, pending)


def _judge_again(session: Session, job_id: str) -> None:
    """Judge the gates of a succeeded training again, because one of its evaluations has ended."""
    if session.scalar(select(Job.status).where(Job.id == job_id)) in (Status.FAILED, Status.CANCELLED):
        return
    # With the lock, the second of two evaluations that end at once sees the first. The training cannot end meanwhile.
    locked = select(Job).where(Job.id == job_id).with_for_update().execution_options(populate_existing=True)
    job = session.scalars(locked).one()
    if job.status != Status.SUCCEEDED or not job.gates:
        return
    before, job.gates = job.gates, judge_gates(session, job, job.metrics or {})
    if any(gate["met"] is None for gate in before) and all(gate["met"] is not None for gate in job.gates):
        job_events.add(session, job_id, quality_gates.summary(job.gates), level=quality_gates.level(job.gates))
        webhooks.enqueue(session, job.project, f"{TRAINING_JOB.webhook}.judged", {"id": job_id, "gates": job.gates})


@dataclass(frozen=True)
class Loss:
    """The error of a job that was given up after lost attempts: its code, and advice for the user."""

    code: str
    advice: str


WORKER_LOST = Loss("worker_lost", "This is a fault of the service or its machines, not of the job's data.")
KILLED_FOR_MEMORY = Loss(
    "out_of_memory",
    "Use a smaller base model, a quantised one or a lower 'max_length', or let the operator give workers more memory.",
)


def recover(session: Session, job: Job, actor: Actor, reason: str, loss: Loss = WORKER_LOST) -> None:
    """Let another attempt continue a job whose worker or trainer died; fail the job if that keeps happening.

    Only the attempts that were lost since the last progress count. The last of them decides what the job is told.
    """
    lost = job.lost_attempts + 1
    if lost < MAX_LOST_ATTEMPTS:
        _try_again(session, job, actor, reason, retry_pause(lost), lost_attempts=lost)
        return
    message = (
        f"{reason} This happened {lost} times without progress, so the job was given up. "
        f"{loss.advice}{_last_checkpoint(session, job)}"
    )
    transition(
        session,
        job.id,
        Status(job.status),
        Status.FAILED,
        actor=actor,
        attempt=job.attempt,
        message=message,
        level="error",
        error={"code": loss.code, "message": message, "param": None},
    )


def set_back(session: Session, job: Job, actor: Actor, reason: str) -> None:
    """Let another attempt continue a job that the object store, a disk or the database has stopped.

    The attempt does not count as lost, because the next jobs would meet the same fault. The pauses grow instead.
    """
    setbacks = job.setbacks + 1
    _try_again(session, job, actor, reason, setback_pause(setbacks), setbacks=setbacks)


def _try_again(session: Session, job: Job, actor: Actor, reason: str, pause: float, **counts: int) -> None:
    """Give the job's lease back, so that another attempt may begin after `pause` seconds."""
    if job.status == Status.RUNNING:
        transition(
            session,
            job.id,
            Status.RUNNING,
            Status.QUEUED,
            actor=actor,
            attempt=job.attempt,
            message=f"{reason} The job will resume.{_last_checkpoint(session, job)}",
            level="warn",
            eligible_at=database_now() + pause,
            **counts,
        )
    elif JOBS.release(session, job.id, job.attempt, pause=pause, **counts):
        job_events.add(session, job.id, f"{reason} The files will be checked again.", level="warn")


def _last_checkpoint(session: Session, job: Job) -> str:
    """A sentence that names the job's last checkpoint; empty if it has none."""
    checkpoint = job_checkpoints.last(session, job.id)
    return f" Its last checkpoint is {checkpoint.model_name}." if checkpoint else ""
