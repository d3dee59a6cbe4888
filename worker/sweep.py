"""Remove the objects that no row needs: what a dead process left half done, and what only a resume would have read.

The rows decide, object by object: a sweep may end anywhere, and several at once do no harm.
"""

import time
from collections.abc import Callable

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.files.tables import File
from app.jobs.states import ACTIVE
from app.jobs.tables import Checkpoint, Job
from app.models.tables import Model
from app.services import Services
from app.tasks.tables import Task
from app.uploads.tables import UploadPart

log = structlog.get_logger(__name__)

GRACE_SECONDS = 3600.0
"""A row is written within seconds of its object, and while a job or a task is not done all of its objects are kept."""
CACHE_SECONDS = 30 * 24 * 3600.0
"""What is cached is computed again where it is missed."""


def sweep(services: Services, grace: float = GRACE_SECONDS) -> int:
    """Look at every object that was last written more than `grace` seconds ago. Returns how many were removed."""
    removed = 0
    for prefix, needed in NEEDED.items():
        for batch in services.storage.batches(prefix):
            age = CACHE_SECONDS if prefix == "cache" else grace
            old = [key for key, written_at in batch if written_at <= time.time() - age]
            with services.database.read() as session:
                kept = needed(session, old)
            for key in old:
                if key not in kept:
                    services.storage.delete(key)
                    removed += 1
    if removed:
        log.info("objects swept", count=removed)
    return removed


def _files(session: Session, keys: list[str]) -> set[str]:
    """Those of files that are there; the bytes of deleted ones go with their rows."""
    names = [_part(key, 1) for key in keys]
    found = set(session.scalars(select(File.id).where(File.id.in_(names))))
    return {key for key in keys if _part(key, 1) in found}


def _parts(session: Session, keys: list[str]) -> set[str]:
    names = [_part(key, 2) for key in keys]
    found = set(session.scalars(select(UploadPart.id).where(UploadPart.id.in_(names))))
    return {key for key in keys if _part(key, 2) in found}


def _jobs(session: Session, keys: list[str]) -> set[str]:
    """All of a job that has not ended; else its model, the models of its checkpoints, and its logs."""
    ids = {_part(key, 1) for key in keys}
    active = set(session.scalars(select(Job.id).where(Job.id.in_(ids), Job.status.in_(ACTIVE))))
    folders = set(session.scalars(select(Model.prefix).where(Model.job_id.in_(ids))))
    folders |= {
        f"{prefix}/model" for prefix in session.scalars(select(Checkpoint.prefix).where(Checkpoint.job_id.in_(ids)))
    }
    return {
        key
        for key in keys
        if _part(key, 1) in active
        or key.endswith("/trainer.log")
        or any(key.startswith(f"{folder}/") for folder in folders)
    }


def _merged(session: Session, keys: list[str]) -> set[str]:
    """Those of merges that are being made, and the results of those that are done."""
    tasks = session.scalars(select(Task).where(Task.id.in_([_part(key, 1) for key in keys])))
    folders = [f"merged/{task.id}" if task.status == "pending" else (task.result or {}).get("prefix") for task in tasks]
    return {key for key in keys if any(folder and key.startswith(f"{folder}/") for folder in folders)}


def _nothing(_session: Session, _keys: list[str]) -> set[str]:
    return set()


def _part(key: str, number: int) -> str:
    return [*key.split("/"), "", ""][number]


NEEDED: dict[str, Callable[[Session, list[str]], set[str]]] = {
    "files": _files,
    "uploads": _parts,
    "jobs": _jobs,
    "merged": _merged,
    "cache": _nothing,
}
"""By the first part of an object's key: which of some keys are needed."""
