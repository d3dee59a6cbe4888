"""All SQL about projects and the storage that they use."""

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.files.tables import File
from app.models.tables import Model
from app.projects.tables import Project
from app.uploads.tables import Upload


def get(session: Session, project_id: str) -> Project | None:
    return session.get(Project, project_id)


def lock(session: Session, project_id: str) -> Project:
    """A project as it is now, locked until the transaction ends. Whoever also locks one of its jobs does that first."""
    locked = {"key_share": True}  # on PostgreSQL FOR NO KEY UPDATE
    return session.get_one(Project, project_id, with_for_update=locked, populate_existing=True)


def listed(session: Session) -> Sequence[Project]:
    return session.scalars(select(Project).order_by(Project.created_at, Project.id)).all()


def storage_bytes(session: Session, project_id: str) -> int:
    """Bytes that the project uses: its files, its pending uploads at their full size, and its models.

    A deleted file counts until its object is removed, which waits for the jobs that read it.
    """
    files = select(func.coalesce(func.sum(File.bytes), 0)).where(File.project == project_id)
    pending = (Upload.project == project_id, Upload.status == "pending")
    uploads = select(func.coalesce(func.sum(Upload.bytes), 0)).where(*pending)
    models = select(func.coalesce(func.sum(Model.bytes), 0)).where(Model.project == project_id)
    return sum(int(session.scalars(statement).one()) for statement in (files, uploads, models))
