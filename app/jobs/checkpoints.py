"""The checkpoints of jobs. All SQL about them is here."""

from collections.abc import Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app.jobs.tables import Checkpoint
from app.pagination import keyset

MAX_CHECKPOINTS = 1000


def page(session: Session, job_id: str, *, after: str | None, limit: int) -> list[Checkpoint] | None:
    """Up to `limit` + 1 checkpoints, latest step first; None where `after` is not one of this job."""
    statement, mark = select(Checkpoint).where(Checkpoint.job_id == job_id), None
    if after is not None:
        mark = session.scalar(statement.where(Checkpoint.id == after))
        if mark is None:
            return None
    return list(session.scalars(keyset(statement, (Checkpoint.step_number,), mark, limit)))


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


def move(session: Session, job_id: str, step: int, prefix: str) -> bool:
    """Let the job's checkpoint of `step` be the one under `prefix`; False where there is none of that step."""
    which = (Checkpoint.job_id == job_id, Checkpoint.step_number == step)
    return session.scalar(update(Checkpoint).where(*which).values(prefix=prefix).returning(Checkpoint.id)) is not None


def hold(session: Session, checkpoint_ids: Sequence[str]) -> None:
    """Let nobody begin to use these checkpoints until this transaction ends."""
    which = Checkpoint.id.in_(checkpoint_ids)
    session.execute(select(Checkpoint.id).where(which).order_by(Checkpoint.id).with_for_update())


def forget(session: Session, checkpoint_ids: Sequence[str]) -> None:
    """Remove the rows of checkpoints."""
    session.execute(delete(Checkpoint).where(Checkpoint.id.in_(checkpoint_ids)))
