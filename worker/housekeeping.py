"""What every worker does beside its jobs, every few seconds or every hour. That several do it at once is harmless."""

import time

import structlog
from sqlalchemy import delete, select

from app.database import Database
from app.derived_artifacts import repository as artifacts
from app.files import repository as files
from app.files.tables import File
from app.idempotency import service as idempotency
from app.jobs import events as job_events
from app.jobs import queries
from app.prune import prune
from app.services import Services
from app.uploads import repository as uploads
from app.webhooks import repository as webhooks

FORGET_AT_ONCE = 1000

log = structlog.get_logger(__name__)


def keep_house(services: Services) -> None:
    """End what is past its time, and remove what nobody can reach any more."""
    expire(services)
    purge_deleted_files(services)


def forget(services: Services) -> None:
    """Forget what is told of jobs that ended long ago."""
    days = services.settings.retain_events_days
    if days:
        log.info("old events forgotten", rows=forget_old_events(services.database, days * 86400), days=days)


def clear_out(services: Services) -> None:
    """Remove the objects that no row needs any more."""
    hours = services.settings.prune_after_hours
    if hours:
        needed, removed = prune(services, delete=True, grace=hours * 3600)
        log.info("objects swept", needed=needed, removed=removed)


def forget_old_events(database: Database, seconds: float) -> int:
    """Remove the events of jobs that ended more than `seconds` ago, and webhooks' deliveries; returns the rows.

    A job's last metrics are in its own row and stay.
    """
    forgotten = 0
    while True:
        with database.write() as session:
            rows = job_events.forget(session, seconds, FORGET_AT_ONCE)
            rows += webhooks.forget(session, seconds, FORGET_AT_ONCE)
        forgotten += rows
        if rows == 0:
            return forgotten
        time.sleep(0.1)  # for those who wait to write


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
        used = queries.active_files(session) if deleted else set()
    for file in deleted:
        if file.id not in used:
            services.storage.delete(file.key)
            if file.sha256:  # what was made of it goes with it
                services.storage.delete_folder(f"cache/tokens/{file.sha256}")
            with services.database.write() as session:
                artifacts.forget(session, file.id)
                session.execute(delete(File).where(File.id == file.id))
