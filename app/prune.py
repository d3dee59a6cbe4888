"""Find the objects that no row needs: what a dead process left half done, and what only a resume would have read.

The rows decide, object by object, and only beside a database that is this store's: beside another no object would
be needed. Workers do it every hour, and a person with `dpo storage prune`.
"""

import time
from collections.abc import Callable

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.derived_artifacts.tables import DerivedArtifact
from app.errors import Conflict
from app.files.tables import File
from app.installation import KEY, name_of, owner_of
from app.jobs.states import ACTIVE
from app.jobs.tables import Checkpoint, Job, JobEvent
from app.models.tables import Model
from app.services import Services
from app.uploads.tables import UploadPart

log = structlog.get_logger(__name__)

GRACE_SECONDS = 24 * 3600.0
"""A row is written within seconds of its object, but some stores date an object by the beginning of its upload."""
CACHE_SECONDS = 30 * 24 * 3600.0
"""What is cached is computed again where it is missed."""


def prune(services: Services, *, delete: bool, grace: float = GRACE_SECONDS) -> tuple[int, int]:
    """Look at every object that was last written more than `grace` seconds ago.

    Returns (objects that are needed, objects that are not); `delete` removes those. Raises `Conflict` where the store
    belongs to another installation than the database.
    """
    if not _is_ours(services):
        raise Conflict(
            "The object store is another installation's than the database: what one needs, the other does not know. "
            "Check DPO_DATABASE_URL and DPO_STORAGE_URL. If they do belong together, delete the object 'installation'.",
            code="another_installation",
        )
    needed, spare = 0, 0
    for prefix, find in NEEDED.items():
        age = CACHE_SECONDS if prefix == "cache" else grace
        for batch in services.storage.batches(prefix):
            old = [key for key, written_at in batch if written_at <= time.time() - age]
            with services.database.read() as session:
                kept = find(session, old)
            needed += len(batch) - len(old) + len(kept)
            spare += len(old) - len(kept)
            if delete:
                _remove(services, [key for key in old if key not in kept])
    return needed, spare


def _remove(services: Services, keys: list[str]) -> None:
    for key in keys:
        try:
            services.storage.delete(key)
        except Exception as error:  # one that cannot be removed must not keep the others
            log.warning("object not removed", key=key, reason=str(error))


def _is_ours(services: Services) -> bool:
    """Whether the store is this database's; one that nobody has put a name to is given it where that may be done."""
    name, owner = name_of(services.database), owner_of(services.storage)
    if owner is None and _may_adopt(services):
        services.storage.put_bytes(KEY, name.encode())
        owner = owner_of(services.storage)
    return owner == name


def _may_adopt(services: Services) -> bool:
    """Whether the store holds nothing, or something that a row needs: beside a wrong or empty database nothing is."""
    empty = True
    for prefix in NEEDED.keys() - {"cache"}:
        for batch in services.storage.batches(prefix):
            empty = False
            with services.database.read() as session:
                if NEEDED[prefix](session, [key for key, _ in batch]):
                    return True
    return empty


def tidy_job(services: Services, job_id: str) -> None:
    """Remove at once what only a resume of a job that has ended would have read, and what dead attempts left of it."""
    keys = [key for key, _size in services.storage.list(f"jobs/{job_id}")]
    with services.database.read() as session:
        kept = _jobs(session, keys)
    _remove(services, [key for key in keys if key not in kept])


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
    """All of a job that has not ended; else its model, those of its checkpoints, and, while it has events, its logs."""
    ids = {_part(key, 1) for key in keys}
    active = set(session.scalars(select(Job.id).where(Job.id.in_(ids), Job.status.in_(ACTIVE))))
    told = set(session.scalars(select(JobEvent.job_id).where(JobEvent.job_id.in_(ids)).distinct()))
    folders = set(session.scalars(select(Model.prefix).where(Model.job_id.in_(ids))))
    folders |= {
        f"{prefix}/model" for prefix in session.scalars(select(Checkpoint.prefix).where(Checkpoint.job_id.in_(ids)))
    }
    return {
        key
        for key in keys
        if _part(key, 1) in active
        or (key.endswith("/trainer.log") and _part(key, 1) in told)
        or any(key.startswith(f"{folder}/") for folder in folders)
    }


def _merged(session: Session, keys: list[str]) -> set[str]:
    """Those of merges that are being made, and the results of those that are done."""
    tasks = session.scalars(select(DerivedArtifact).where(DerivedArtifact.id.in_([_part(key, 1) for key in keys])))
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
