"""Housekeeping, every few seconds or every hour. Each part is a chore: one worker at a time does it."""

import time
from collections.abc import Callable

import structlog
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app import chores, counted_objects
from app.audit import repository as audit
from app.database import Database, now
from app.derived_artifacts import repository as artifacts
from app.files import repository as files
from app.files.tables import File
from app.idempotency import service as idempotency
from app.jobs import event_blocks, fair_share, labels, queries
from app.jobs import events as job_events
from app.projects import reservations
from app.prune import prune_slice
from app.services import Services
from app.uploads import repository as uploads
from app.usage import repository as usage
from app.webhooks import repository as webhooks

FORGET_BATCH = 1000
"""Maximum number of rows that one transaction deletes from a table."""

EXPIRY_SECONDS, RETENTION_SECONDS = 2.0, 3600.0
"""Intervals at which things expire, and at which old events are deleted."""
PIPELINE_SECONDS = 2.0
"""Interval at which pipelines are taken further."""
USE_SECONDS, STORAGE_SECONDS = 60.0, 3600.0
"""Intervals at which the GPU time of running jobs is counted, and at which what projects store is measured."""
PACK_SECONDS, PACK_BLOCKS = 60.0, 300
"""Interval at which events are packed, and the most blocks that are made each time."""
LABEL_SECONDS, LABEL_BATCHES, LABEL_JOBS = 60.0, 20, 200
"""Interval at which jobs without labels are labelled, the most transactions each time, and the jobs of each."""
ROLLOUT_SECONDS = 86400.0
"""The longest time that processes of two versions run side by side."""
SLICE_SECONDS, PASS_SECONDS = 60.0, 3600.0
"""Pause between two slices of the object store, and between its last slice and its first."""

log = structlog.get_logger(__name__)


def keep_house(services: Services) -> None:
    """End what has expired, remove deleted files, and take pipelines further. One worker at a time does it."""
    if chores.take(services.database, "expiry", EXPIRY_SECONDS) is not None:
        expire(services)
        purge_deleted_files(services)
    if chores.take(services.database, "pipelines", PIPELINE_SECONDS) is not None:
        services.pipelines.look()


def count_usage(services: Services) -> None:
    """Count what projects use: GPU time of running jobs, and bytes stored. One worker at a time does it."""
    database = services.database
    if chores.take(database, "count use", USE_SECONDS) is not None:
        fair_share.count_running(database)
    measured_at = chores.take(database, "measure storage", STORAGE_SECONDS)
    if measured_at is not None:
        measured_now = usage.measure_storage(database, float(measured_at or "nan"))
        chores.note(database, "measure storage", str(measured_now), STORAGE_SECONDS)


def apply_retention(services: Services) -> None:
    """Delete events and webhook deliveries that are older than DPO_RETAIN_EVENTS_DAYS. One worker does it each hour."""
    days = services.settings.retain_events_days
    if days and chores.take(services.database, "retention", RETENTION_SECONDS) is not None:
        log.info("old events forgotten", rows=forget_old_events(services.database, days * 86400), days=days)


def pack_events(services: Services) -> None:
    """Move events of ended jobs from rows to blocks, some each minute. One worker at a time does it.

    It begins a day after the first worker that can do it: an API of the version before would not find them in blocks.
    """
    if (chore_age := _take(services.database, "pack events", PACK_SECONDS)) is None or chore_age < ROLLOUT_SECONDS:
        return
    _repeat(services.database, event_blocks.pack, PACK_BLOCKS)


def label_jobs(services: Services) -> None:
    """Label jobs of an earlier version, some each minute. One worker at a time does it."""
    if chores.take(services.database, "label jobs", LABEL_SECONDS) is None:
        return
    _repeat(services.database, lambda session: labels.label_some(session, LABEL_JOBS), LABEL_BATCHES)


def _repeat(database: Database, work: Callable[[Session], object], most: int) -> None:
    """Do `work` in a transaction each time, until it finds nothing to do, at most `most` times."""
    for _ in range(most):
        with database.write() as session:
            if not work(session):
                return
        time.sleep(0.01)  # lets other writers in


def retain_checkpoints(services: Services) -> None:
    """Delete the checkpoints of jobs that ended before DPO_RETAIN_CHECKPOINTS_DAYS. One worker does it each hour.

    It begins so many days after the first worker that can do it. Until then, an operator may decide otherwise about the
    checkpoints of years.
    """
    seconds = services.settings.retain_checkpoints_days * 86400
    if not seconds:
        return
    if (chore_age := _take(services.database, "checkpoints", RETENTION_SECONDS)) is None or chore_age < seconds:
        return
    log.info("old checkpoints deleted", folders=services.models.forget_checkpoints(seconds))


def _take(database: Database, name: str, seconds: float) -> float | None:
    """As `chores.take`, for a chore whose cursor is the time when it was due for the first time.

    Returns the seconds since then; None if it is not due.
    """
    began_at = chores.take(database, name, seconds)
    if began_at is None:
        return None
    with database.read() as session:
        current = now(session)
    if not began_at:
        chores.note(database, name, str(current), seconds)
    return current - float(began_at or current)


def prune_objects(services: Services) -> None:
    """Remove objects that no row needs and that are older than DPO_PRUNE_AFTER_HOURS: one slice of the store a minute.

    One worker at a time does it. Raises what `prune_slice` raises.
    """
    hours = services.settings.prune_after_hours
    cursor = chores.take(services.database, "prune", SLICE_SECONDS) if hours else None
    if cursor is not None:
        pruned = prune_slice(services, cursor, delete=True, min_age=hours * 3600)
        pause = SLICE_SECONDS if pruned.cursor else PASS_SECONDS
        chores.note(services.database, "prune", pruned.cursor, pause)
        log.info("objects pruned", needed=pruned.needed, removed=pruned.unneeded, cursor=pruned.cursor)


def forget_old_events(database: Database, seconds: float) -> int:
    """Delete the events of jobs that ended more than `seconds` ago, webhook deliveries and audit events of that age.

    Returns the number of rows. The last metrics of a job are in the job's row and stay.
    """
    forgotten = 0
    while True:
        with database.write() as session:
            events, more = job_events.forget(session, seconds, FORGET_BATCH)
            deliveries = webhooks.forget(session, seconds, FORGET_BATCH)
            changes = audit.forget(session, seconds, FORGET_BATCH)
        forgotten += events + deliveries + changes
        if not more and deliveries == changes == 0:
            return forgotten
        time.sleep(0.1)  # lets other writers in


def expire(services: Services) -> None:
    """End or delete what has expired: files, uploads with their parts, idempotency keys and merged models."""
    with services.database.write() as session:
        files.expire(session)
        uploads.expire(session)
        idempotency.forget_old(session)
        reservations.forget_expired(session)
        ended = uploads.ended_with_parts(session)
    for upload in ended:
        services.uploads.tidy(upload)
    services.models.forget_merged()


def purge_deleted_files(services: Services) -> None:
    """Remove deleted files that no unfinished job reads. The row goes after its object, so a failure is retried."""
    with services.database.read() as session:
        deleted = session.scalars(select(File).where(File.deleted_at.is_not(None))).all()
        unused = [file for file in deleted if not queries.users_of(session, file.id)]
    for file in unused:
        services.storage.delete(file.key)
        cached: list[str] = []
        if file.sha256:  # its tokenised forms go with it
            shared = services.settings.share_cache
            tokens = counted_objects.key_of(file.project, f"tokens/{file.sha256}", shared=shared)
            cached = [key for key, _ in services.storage.list(tokens)]
            services.storage.delete_folder(tokens)
        with services.database.write() as session:
            counted_objects.forget(session, cached)
            artifacts.forget(session, file.id)
            session.execute(delete(File).where(File.id == file.id))
