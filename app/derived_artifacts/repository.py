"""All SQL about derived artifacts: which are to be made, and who makes them."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.database import database_now, new_id
from app.derived_artifacts.tables import DerivedArtifact
from app.work_queue import MAX_LOST_ATTEMPTS, WorkQueue, retry_pause
from app.workers.repository import served_by

ARTIFACTS = WorkQueue(
    DerivedArtifact,
    noun="artifact",
    active=DerivedArtifact.status == "pending",
    order=(DerivedArtifact.created_at, DerivedArtifact.id),
)
REPORT, MERGE = "report", "merge"
TRANSIENT, AGAIN_SECONDS = ("worker_lost", "model_unavailable"), 300.0
"""Failures that say nothing of the artifact, and after how long it it is tried again when somebody asks for it."""


def find(session: Session, kind: str, subject: str) -> DerivedArtifact | None:
    return session.scalar(
        select(DerivedArtifact).where(DerivedArtifact.kind == kind, DerivedArtifact.subject == subject)
    )


def pending(session: Session, project: str, seconds: float) -> int:
    """How many reports in tokens a project has asked for in the last `seconds` that are not done."""
    counted = (
        DerivedArtifact.kind == REPORT,
        DerivedArtifact.base_model.is_not(None),
        DerivedArtifact.created_at > database_now() - seconds,
    )
    waiting = (
        select(func.count())
        .select_from(DerivedArtifact)
        .where(DerivedArtifact.project == project, DerivedArtifact.status == "pending", *counted)
    )
    return session.scalars(waiting).one()


def ensure(
    session: Session,
    kind: str,
    subject: str,
    *,
    project: str,
    owner: str,
    arguments: dict[str, Any],
    base_model: str | None = None,
) -> DerivedArtifact:
    """The artifact, made where it is not there.

    One that failed through no fault of its subject is tried again after a while.
    """
    artifact = find(session, kind, subject)
    if artifact is not None and artifact.status == "failed" and (artifact.error or {}).get("code") in TRANSIENT:
        old = delete(DerivedArtifact).where(
            DerivedArtifact.id == artifact.id, DerivedArtifact.finished_at < database_now() - AGAIN_SECONDS
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
        except IntegrityError:  # another asked for the same at the same moment
            found = find(session, kind, subject)
            assert found is not None
            return found
    return artifact


def claim(session: Session, owner: str, served: Sequence[str]) -> DerivedArtifact | None:
    """Take the lease of the oldest artifact that can be made where `served` base models are."""
    able = or_(DerivedArtifact.base_model.is_(None), served_by(DerivedArtifact.base_model, served))
    return ARTIFACTS.claim(session, owner, ARTIFACTS.active, able)


def finish(
    session: Session,
    artifact_id: str,
    attempt: int,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> bool:
    """End an artifact whose lease this attempt holds, or has ended already; False where another has it."""
    values = {
        "status": "done" if error is None else "failed",
        "result": result,
        "error": error,
        "finished_at": database_now(),
        "lease_owner": None,
        "lease_expires_at": None,
    }
    if ARTIFACTS.write(session, artifact_id, attempt, **values):
        return True
    # The commit may have been done and only its answer lost. Nobody else ends the artifact as this attempt.
    ended = select(DerivedArtifact.id).where(
        DerivedArtifact.id == artifact_id,
        DerivedArtifact.attempt == attempt,
        DerivedArtifact.status == values["status"],
    )
    return session.scalar(ended) is not None


def recover(session: Session, artifact: DerivedArtifact, reason: str) -> None:
    """Let another attempt make an artifact whose worker was lost; fail it when that keeps happening."""
    lost = artifact.lost_attempts + 1
    if lost >= MAX_LOST_ATTEMPTS:
        finish(session, artifact.id, artifact.attempt, error={"code": "worker_lost", "message": reason})
        return
    ARTIFACTS.release(session, artifact.id, artifact.attempt, pause=retry_pause(lost), lost_attempts=lost)


def of_owner(session: Session, owner: str) -> Sequence[DerivedArtifact]:
    """The artifacts that go with a file or a model."""
    return session.scalars(select(DerivedArtifact).where(DerivedArtifact.owner == owner)).all()


def finished_before(session: Session, kind: str, seconds: float) -> Sequence[DerivedArtifact]:
    """The artifacts of a kind that ended more than `seconds` ago."""
    return session.scalars(
        select(DerivedArtifact).where(
            DerivedArtifact.kind == kind, DerivedArtifact.finished_at < database_now() - seconds
        )
    ).all()


def forget(session: Session, owner: str) -> None:
    """Remove the artifacts that go with a file or a model that is gone."""
    session.execute(delete(DerivedArtifact).where(DerivedArtifact.owner == owner))
