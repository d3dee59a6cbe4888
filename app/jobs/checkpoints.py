"""All SQL about the checkpoints of jobs."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.orm import Session

from app.database import database_now
from app.jobs.tables import Checkpoint, Job
from app.pagination import keyset
from app.stored_content import FolderContent

MAX_CHECKPOINTS = 1000


def page(session: Session, job_id: str, *, after: str | None, limit: int) -> list[Checkpoint] | None:
    """Up to `limit` + 1 checkpoints, latest step first; None if `after` is not a checkpoint of this job."""
    statement, after_checkpoint = select(Checkpoint).where(Checkpoint.job_id == job_id), None
    if after is not None:
        after_checkpoint = session.scalar(statement.where(Checkpoint.id == after))
        if after_checkpoint is None:
            return None
    return list(session.scalars(keyset(statement, (Checkpoint.step_number,), after_checkpoint, limit)))


def last(session: Session, job_id: str) -> Checkpoint | None:
    """The checkpoint of a job's latest step; None if it has none."""
    statement = select(Checkpoint).where(Checkpoint.job_id == job_id)
    return session.scalar(statement.order_by(Checkpoint.step_number.desc()).limit(1))


def last_of_ended_stage(session: Session, job_id: str, stage: str) -> Checkpoint | None:
    """The last checkpoint of `stage`; None if it has none, or if the stage may still be running.

    A checkpoint of a later stage shows that the stage has ended.
    """
    statement = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step_number.desc())
    latest_first = list(session.scalars(statement))
    if not latest_first or latest_first[0].stage == stage:
        return None
    return next((checkpoint for checkpoint in latest_first if checkpoint.stage == stage), None)


def stage_of(session: Session, model: str) -> str | None:
    """The stage that saved the checkpoint `model`; None if `model` is not a checkpoint."""
    return session.scalar(select(Checkpoint.stage).where(Checkpoint.model_name == model))


def move(session: Session, job_id: str, step: int, prefix: str, content: FolderContent, state_bytes: int) -> bool:
    """Point the job's checkpoint of `step` to the folder `prefix`; False if that step has no checkpoint.

    `content` is that of its model, and `state_bytes` the size of its training state.
    """
    statement = update(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step_number == step)
    columns = content.as_columns() | {"prefix": prefix, "content_of": prefix, "state_bytes": state_bytes}
    moved = statement.values(**columns).returning(Checkpoint.id)
    return session.scalar(moved) is not None


def named(session: Session, project: str, model: str) -> Checkpoint | None:
    """The checkpoint `model` of a project; None if there is none."""
    statement = select(Checkpoint).join(Job, Job.id == Checkpoint.job_id)
    return session.scalar(statement.where(Checkpoint.model_name == model, Job.project == project))


def of_job(session: Session, job_id: str) -> Sequence[Checkpoint]:
    """All checkpoints of a job."""
    return session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id)).all()


def old(session: Session, seconds: float, after: Checkpoint | None, limit: int) -> Sequence[Checkpoint]:
    """Up to `limit` + 1 checkpoints that are older than `seconds`, and whose job ended so long ago, oldest first.

    None asks for the first ones, and `after` for those behind it.
    """
    before = database_now() - seconds
    statement = select(Checkpoint).join(Job, Job.id == Checkpoint.job_id)
    statement = statement.where(Checkpoint.created_at < before, Job.finished_at < before)
    return session.scalars(
        keyset(statement, (Checkpoint.created_at, Checkpoint.id), after, limit, ascending=True)
    ).all()


def note_state_deleted(session: Session, *checkpoints: ColumnElement[bool]) -> None:
    """Write that the training states of these checkpoints are deleted."""
    session.execute(update(Checkpoint).where(*checkpoints, Checkpoint.state_bytes > 0).values(state_bytes=0))


def lock(session: Session, checkpoint_ids: Sequence[str]) -> None:
    """Lock these checkpoints: nobody can begin to use them until this transaction ends."""
    selected = Checkpoint.id.in_(checkpoint_ids)
    session.execute(select(Checkpoint.id).where(selected).order_by(Checkpoint.id).with_for_update())


def forget(session: Session, checkpoint_ids: Sequence[str]) -> None:
    """Delete the rows of these checkpoints."""
    session.execute(delete(Checkpoint).where(Checkpoint.id.in_(checkpoint_ids)))
