"""All SQL about derived artifacts: requests, leases and results."""

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, delete, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import counted_objects
from app.database import database_now, new_id
from app.derived_artifacts.tables import DerivedArtifact
from app.spec.json_types import JsonObject
from app.stored_content import GONE
from app.work_queue import MAX_LOST_ATTEMPTS, WorkQueue, retry_pause, setback_pause
from app.workers.repository import served_by

ARTIFACTS = WorkQueue(
    DerivedArtifact,
    noun="artifact",
    active=DerivedArtifact.status == "pending",
    order=(DerivedArtifact.created_at, DerivedArtifact.id),
)
REPORT, MERGE = "report", "merge"
TRANSIENT = ("worker_lost", "model_unavailable", GONE)
"""Error codes of failures that the artifact's subject did not cause."""
TRANSIENT_RETRY_SECONDS = 300.0
"""After this time, a new request tries an artifact with such a failure again."""


def find(session: Session, kind: str, subject: str) -> DerivedArtifact | None:
    return session.scalar(
        select(DerivedArtifact).where(DerivedArtifact.kind == kind, DerivedArtifact.subject == subject)
    )


def pending_token_reports(session: Session, project: str, seconds: float) -> int:
    """Number of pending token reports that a project requested in the last `seconds`."""
    conditions = (
        DerivedArtifact.kind == REPORT,
        DerivedArtifact.base_model.is_not(None),
        DerivedArtifact.created_at > database_now() - seconds,
    )
    statement = (
        select(func.count())
        .select_from(DerivedArtifact)
        .where(DerivedArtifact.project == project, DerivedArtifact.status == "pending", *conditions)
    )
    return session.scalars(statement).one()


def pending_merges(session: Session, project: str) -> int:
    """Number of merged models that a project waits for."""
    pending = (DerivedArtifact.kind == MERGE, DerivedArtifact.status == "pending", DerivedArtifact.project == project)
    return session.scalars(select(func.count()).select_from(DerivedArtifact).where(*pending)).one()


def ensure(
    session: Session,
    kind: str,
    subject: str,
    *,
    project: str,
    owner: str,
    arguments: JsonObject,
    base_model: str | None = None,
) -> DerivedArtifact:
    """The artifact of a kind and subject. If it does not exist, a new pending row requests it.

    An artifact with a transient failure is requested again after `TRANSIENT_RETRY_SECONDS`.
    """
    artifact = find(session, kind, subject)
    if artifact is not None and artifact.status == "failed" and (artifact.error or {}).get("code") in TRANSIENT:
        old = delete(DerivedArtifact).where(
            DerivedArtifact.id == artifact.id, DerivedArtifact.finished_at < database_now() - TRANSIENT_RETRY_SECONDS
        )
        if session.scalar(old.returning(DerivedArtifact.id)) is not None:
            session.expunge(artifact)
            artifact = None
    if artifact is None:
        artifact = DerivedArtifact(
            id=new_id("task"),
            kind=kind,
            subject=subject,
            owner=owner,
            project=project,
            base_model=base_model,
            arguments=arguments,
            created_at=database_now(),
            status="pending",
            attempt=0,
            eligible_at=0.0,
            lost_attempts=0,
        )
        try:
            with session.begin_nested():
                session.add(artifact)
                session.flush()
        except IntegrityError:  # another request inserted it at the same time
            existing = find(session, kind, subject)
            assert existing is not None
            return existing
    return artifact


def claim(
    session: Session,
    owner: str,
    served: Sequence[str],
    kinds: Collection[str] = (REPORT, MERGE),
    busy: Collection[str] = (),
) -> DerivedArtifact | None:
    """Take the lease of the oldest artifact of `kinds` that a worker with the base models `served` can make.

    Those of the projects `busy` are left alone.
    """
    can_make = or_(DerivedArtifact.base_model.is_(None), served_by(DerivedArtifact.base_model, served))
    free = (DerivedArtifact.kind.in_(kinds), DerivedArtifact.project.not_in(busy))
    return ARTIFACTS.claim(session, owner, ARTIFACTS.active, can_make, *free)


def finish(
    session: Session,
    artifact_id: str,
    attempt: int,
    *,
    result: JsonObject | None = None,
    error: JsonObject | None = None,
) -> bool:
    """End an artifact as the attempt that holds its lease; False if another attempt has it.

    It may be called twice for the same attempt. `error` None means success. A folder that the attempt has stored, the
    `prefix` of its result, counts from now on.
    """
    values = {
        "status": "done" if error is None else "failed",
        "result": result,
        "error": error,
        "finished_at": database_now(),
        "lease_owner": None,
        "lease_expires_at": None,
    }
    if ARTIFACTS.write(session, artifact_id, attempt, **values):
        if result is not None and "prefix" in result:
            project = session.get_one(DerivedArtifact, artifact_id).project
            counted_objects.note(session, project, result["prefix"], result["bytes"] or 0)
        return True
    # An earlier call may have committed although its answer was lost. No other worker has this attempt number.
    ended = select(DerivedArtifact.id).where(
        DerivedArtifact.id == artifact_id,
        DerivedArtifact.attempt == attempt,
        DerivedArtifact.status == values["status"],
    )
    return session.scalar(ended) is not None


def recover(session: Session, artifact: DerivedArtifact, reason: str) -> None:
    """Release an artifact whose worker was lost. Fail it if that has happened too often."""
    lost = artifact.lost_attempts + 1
    if lost >= MAX_LOST_ATTEMPTS:
        finish(session, artifact.id, artifact.attempt, error={"code": "worker_lost", "message": reason})
        return
    ARTIFACTS.release(session, artifact.id, artifact.attempt, pause=retry_pause(lost), lost_attempts=lost)


def set_back(session: Session, artifact: DerivedArtifact) -> None:
    """Release an artifact that the object store, a disk or the database has stopped. The attempt counts as no loss."""
    setbacks = artifact.setbacks + 1
    pause = setback_pause(setbacks)
    ARTIFACTS.release(session, artifact.id, artifact.attempt, pause=pause, setbacks=setbacks)


def forget_one(session: Session, artifact_id: str) -> None:
    """Delete an artifact."""
    _delete(session, DerivedArtifact.id == artifact_id)


def forget(session: Session, owner: str) -> list[str]:
    """Delete all artifacts of a file or a model. Returns their ids."""
    return _delete(session, DerivedArtifact.owner == owner)


def forget_old(session: Session, kind: str, seconds: float) -> list[str]:
    """Delete the artifacts of a kind that ended more than `seconds` ago. Returns their ids."""
    return _delete(session, DerivedArtifact.kind == kind, DerivedArtifact.finished_at < database_now() - seconds)


def _delete(session: Session, *conditions: ColumnElement[bool]) -> list[str]:
    """Delete rows. The folders that they have stored count no longer. Returns the ids."""
    columns = (DerivedArtifact.id, DerivedArtifact.result)
    deleted = session.execute(delete(DerivedArtifact).where(*conditions).returning(*columns)).all()
    counted_objects.forget(session, [result["prefix"] for _, result in deleted if result and "prefix" in result])
    return [artifact_id for artifact_id, _ in deleted]
