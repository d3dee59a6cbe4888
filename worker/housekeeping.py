"""What every worker does beside its jobs, every few seconds. That several do it at once is harmless."""

import structlog
from sqlalchemy import delete, select

from app.broker import Lane
from app.database import Database
from app.files import repository as files
from app.files.tables import File
from app.idempotency import service as idempotency
from app.jobs import repository
from app.jobs.states import Actor, Status
from app.services import Services
from app.tasks import repository as tasks
from app.uploads import repository as uploads

log = structlog.get_logger(__name__)


def keep_house(services: Services) -> None:
    """Requeue jobs whose worker was lost, and remove what nobody can reach any more."""
    for lane in reap(services.database):
        services.broker.wake(lane)
    expire(services)
    purge_deleted_files(services)


def reap(database: Database) -> set[Lane]:
    """Take expired leases away. Returns the lanes that have work again."""
    lanes = set()
    with database.write() as session:
        for job in repository.expired(session):
            log.warning("lease expired", job=job.id, attempt=job.attempt, owner=job.lease_owner)
            lanes.add(Lane.GPU if job.status == Status.RUNNING else Lane.CPU)
            repository.recover(session, job, Actor.HOUSEKEEPING, "The worker of this job was lost.")
        for task in tasks.expired(session):
            log.warning("lease expired", task=task.id, attempt=task.attempt, owner=task.lease_owner)
            lanes.add(Lane.CPU)
            tasks.hand_back(session, task, "The worker of this task was lost.")
    return lanes


def expire(services: Services) -> None:
    """End what has a time and is past it: files, uploads (with their parts) and remembered requests."""
    with services.database.write() as session:
        files.expire(session)
        uploads.expire(session)
        idempotency.forget_old(session)
        over = uploads.left_over(session)
    for upload in over:
        services.uploads.tidy(upload)
    services.models.forget_merged()


def purge_deleted_files(services: Services) -> None:
    """Remove deleted files that no unfinished job reads: the object first, then the row that remembers it."""
    with services.database.read() as session:
        deleted = list(session.scalars(select(File).where(File.deleted_at.is_not(None))))
        used = repository.active_files(session) if deleted else set()
    for file in deleted:
        if file.id not in used:
            services.storage.delete(file.key)
            if file.sha256:  # what was made of it goes with it
                services.storage.delete_folder(f"cache/tokens/{file.sha256}")
            with services.database.write() as session:
                tasks.forget(session, file.id)
                session.execute(delete(File).where(File.id == file.id))
