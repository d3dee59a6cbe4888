"""Find the objects that no row of the database needs, and delete them.

A dead process leaves half-finished work behind. A finished job leaves objects that only a resume would have read.
The database must belong to the object store: another database would need none of its objects. Workers prune one slice
of the store after another, one worker at a time; an operator prunes all of it with `dpo storage prune`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import counted_objects
from app.database import now
from app.derived_artifacts.tables import DerivedArtifact
from app.errors import Conflict
from app.files.tables import File
from app.installation import INSTALLATION_KEY, database_installation, store_installation
from app.jobs.states import ACTIVE
from app.jobs.tables import Checkpoint, EventBlock, Job, JobEvent
from app.models.tables import Model
from app.services import Services
from app.uploads.tables import UploadPart

log = structlog.get_logger(__name__)

MIN_AGE_SECONDS = 24 * 3600.0
"""Minimum age of an object to delete. Its row follows within seconds, but some stores date it by its upload's start."""
SLICE_OBJECTS, BATCH_OBJECTS = 5000, 500
"""Number of objects that one slice lists, and that are looked for in the database at a time."""
CACHE_SECONDS = 30 * 24 * 3600.0
"""Maximum age of a cached object. It is computed again if it is missing."""


@dataclass(frozen=True)
class Pruned:
    """The number of objects that a row needs, the number of others, and the cursor of the next slice; "" at the end."""

    needed: int
    unneeded: int
    cursor: str


def prune(services: Services, *, delete: bool, min_age: float = MIN_AGE_SECONDS) -> tuple[int, int]:
    """Check every object that was last written more than `min_age` seconds ago. Younger objects count as needed.

    Returns (number of needed objects, number of others); `delete` removes the others. Raises `Conflict` if the store
    belongs to another installation than the database.
    """
    needed, unneeded, cursor = 0, 0, ""
    while True:
        pruned = prune_slice(services, cursor, delete=delete, min_age=min_age)
        needed, unneeded, cursor = needed + pruned.needed, unneeded + pruned.unneeded, pruned.cursor
        if not cursor:
            return needed, unneeded


def prune_slice(
    services: Services, cursor: str, *, delete: bool, min_age: float = MIN_AGE_SECONDS, limit: int = SLICE_OBJECTS
) -> Pruned:
    """As `prune`, for the next `limit` objects after `cursor`, which is "" at the beginning. Raises `Conflict`."""
    if not _is_ours(services):
        raise Conflict(
            "The object store belongs to another installation than the database. "
            "Check DPO_DATABASE_URL and DPO_STORAGE_URL. If they do belong together, delete the object 'installation'.",
            code="another_installation",
        )
    needed, unneeded, room = 0, 0, limit
    prefixes = list(NEEDED)
    for prefix in prefixes[prefixes.index(_segment(cursor, 0)) if cursor else 0 :]:
        age = CACHE_SECONDS if prefix == "cache" else min_age
        after = cursor if _segment(cursor, 0) == prefix else prefix
        objects = services.storage.slice(prefix, after, room)
        for first in range(0, len(objects), BATCH_OBJECTS):
            batch = objects[first : first + BATCH_OBJECTS]
            with services.database.read() as session:
                oldest = now(session) - age
                old = [key for key, written_at in batch if written_at <= oldest]
                kept = NEEDED[prefix](session, old)
            needed += len(batch) - len(old) + len(kept)
            unneeded += len(old) - len(kept)
            if delete:
                _remove(services, [key for key in old if key not in kept])
        room -= len(objects)
        if room == 0:
            return Pruned(needed, unneeded, objects[-1][0])
    return Pruned(needed, unneeded, "")


def _remove(services: Services, keys: list[str]) -> None:
    for key in keys:
        try:
            services.storage.delete(key)
        except Exception as error:  # one failure must not stop the rest
            log.warning("object not removed", key=key, reason=str(error))
    if keys:
        with services.database.write() as session:
            counted_objects.forget(session, keys)


def _is_ours(services: Services) -> bool:
    """Whether the store belongs to this database. A store without an owner is adopted if `_may_adopt` allows it."""
    name, owner = database_installation(services.database), store_installation(services.storage)
    if owner is None and _may_adopt(services):
        services.storage.put_bytes(INSTALLATION_KEY, name.encode())
        owner = store_installation(services.storage)
    return owner == name


def _may_adopt(services: Services) -> bool:
    """Whether the store is empty or a row needs one of its objects. A wrong or empty database needs none."""
    empty = True
    for prefix in NEEDED.keys() - {"cache"}:
        after = prefix
        while objects := services.storage.slice(prefix, after, BATCH_OBJECTS):
            empty, after = False, objects[-1][0]
            with services.database.read() as session:
                if NEEDED[prefix](session, [key for key, _ in objects]):
                    return True
    return empty


def tidy_job(services: Services, job_id: str) -> None:
    """Remove at once what an ended job no longer needs: data for a resume, and leftovers of dead attempts."""
    keys = [key for key, _size in services.storage.list(f"jobs/{job_id}")]
    with services.database.read() as session:
        kept = _jobs(session, keys)
    _remove(services, [key for key in keys if key not in kept])


def _files(session: Session, keys: list[str]) -> set[str]:
    """The objects of files that have a row. The bytes of a deleted file go with its row."""
    file_ids = [_segment(key, 1) for key in keys]
    existing = set(session.scalars(select(File.id).where(File.id.in_(file_ids))))
    return {key for key in keys if _segment(key, 1) in existing}


def _parts(session: Session, keys: list[str]) -> set[str]:
    """The objects of upload parts that have a row."""
    part_ids = [_segment(key, 2) for key in keys]
    existing = set(session.scalars(select(UploadPart.id).where(UploadPart.id.in_(part_ids))))
    return {key for key in keys if _segment(key, 2) in existing}


def _jobs(session: Session, keys: list[str]) -> set[str]:
    """All objects of an active job. An ended job needs its models, and its logs while it has events."""
    job_ids = {_segment(key, 1) for key in keys}
    active = set(session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.status.in_(ACTIVE))))
    with_events = {
        job_id
        for table in (JobEvent, EventBlock)
        for job_id in session.scalars(select(table.job_id).where(table.job_id.in_(job_ids)).distinct())
    }
    folders = set(session.scalars(select(Model.prefix).where(Model.job_id.in_(job_ids))))
    folders |= {
        f"{prefix}/model" for prefix in session.scalars(select(Checkpoint.prefix).where(Checkpoint.job_id.in_(job_ids)))
    }
    return {
        key
        for key in keys
        if _segment(key, 1) in active
        or (key.endswith("/trainer.log") and _segment(key, 1) in with_events)
        or any(key.startswith(f"{folder}/") for folder in folders)
    }


def _merged(session: Session, keys: list[str]) -> set[str]:
    """The objects of pending merges, and the results of finished ones."""
    artifact_ids = [_segment(key, 1) for key in keys]
    merges = session.scalars(select(DerivedArtifact).where(DerivedArtifact.id.in_(artifact_ids)))
    folders = [
        f"merged/{merge.id}" if merge.status == "pending" else (merge.result or {}).get("prefix") for merge in merges
    ]
    return {key for key in keys if any(folder and key.startswith(f"{folder}/") for folder in folders)}


def _nothing(_session: Session, _keys: list[str]) -> set[str]:
    return set()


def _segment(key: str, number: int) -> str:
    """Segment `number` of the path `key`, from 0 on; "" if it has fewer segments."""
    return [*key.split("/"), "", ""][number]


NEEDED: dict[str, Callable[[Session, list[str]], set[str]]] = {
    "files": _files,
    "uploads": _parts,
    "jobs": _jobs,
    "merged": _merged,
    "cache": _nothing,
}
"""By the first segment of an object's key: a function that returns the needed keys among the given ones."""
