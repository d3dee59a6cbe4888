"""All SQL about projects and the storage that they use."""

from collections.abc import Sequence

from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from app.counted_objects import CountedObject
from app.database import database_now
from app.files.tables import File
from app.jobs.tables import Checkpoint
from app.models.tables import Model
from app.projects.tables import Project, Reservation
from app.uploads.tables import Upload


def get(session: Session, project_id: str) -> Project | None:
    return session.get(Project, project_id)


def lock(session: Session, project_id: str) -> Project:
    """A project as it is now, locked until the transaction ends. Whoever also locks one of its jobs does that first."""
    locked = {"key_share": True}  # on PostgreSQL FOR NO KEY UPDATE
    return session.get_one(Project, project_id, with_for_update=locked, populate_existing=True)


def try_lock(session: Session, project_id: str) -> Project | None:
    """As `lock`, but None if another transaction has locked the project."""
    locked = {"key_share": True, "skip_locked": True}
    return session.get(Project, project_id, with_for_update=locked, populate_existing=True)


def listed(session: Session) -> Sequence[Project]:
    return session.scalars(select(Project).order_by(Project.created_at, Project.id)).all()


def storage_bytes(session: Session, project_id: str) -> int:
    """Bytes that the project uses: all that it stores, and what it has reserved for uploads that are on their way.

    Pending uploads in parts count at their full size. A deleted file counts until its object is removed, which waits
    for the jobs that read it.
    """
    stored = (
        (File.bytes, File.project == project_id),
        (Upload.bytes, and_(Upload.project == project_id, Upload.status == "pending")),
        (Model.bytes, Model.project == project_id),
        (func.coalesce(Checkpoint.bytes, 0) + Checkpoint.state_bytes, Checkpoint.project == project_id),
        (CountedObject.bytes, CountedObject.project == project_id),
        (Reservation.bytes, and_(Reservation.project == project_id, Reservation.expires_at > database_now())),
    )
    sums = (select(func.coalesce(func.sum(size), 0)).where(condition) for size, condition in stored)
    return sum(int(session.scalars(statement).one()) for statement in sums)
