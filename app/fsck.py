"""Compare the database with the object store, as after a restore, and mend what differs.

A dump is older than the objects beside it, or the other way round. Rows then name objects that are gone, and jobs have
gone further than their rows say.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from sqlalchemy import select, update
from sqlalchemy.orm import InstrumentedAttribute

from app.database import Table
from app.derived_artifacts import repository as artifacts
from app.files.tables import File
from app.jobs.states import ACTIVE
from app.jobs.tables import Checkpoint, Job
from app.models.tables import Model
from app.services import Services
from app.stored_content import ContentDamaged, FolderContent, fetch_file, fetch_folder
from app.webhooks.tables import WebhookDelivery

BATCH = 500
ATTEMPT = re.compile(r"jobs/[^/]+/attempt-(\d+)/")
Row = TypeVar("Row", bound=Table)
NAMES: dict[str, tuple[type[Table], InstrumentedAttribute[str]]] = {
    "file": (File, File.id), "model": (Model, Model.name), "checkpoint": (Checkpoint, Checkpoint.model_name),
}  # fmt: skip
"""By the kind of a finding: the table of its row, and the column with its name."""


@dataclass(frozen=True)
class Finding:
    """A row that the object store contradicts."""

    kind: Literal["file", "model", "checkpoint", "job"]
    name: str
    problem: str
    """The end of a sentence that begins with the name."""


def check(services: Services, *, content: bool = False) -> Iterator[Finding]:
    """Every row that the object store contradicts. With `content`, all objects are read and hashed; it takes long."""
    for file in _rows(services, File, File.id):
        if file.deleted_at is None and (problem := _file_problem(services, file, content)):
            yield Finding("file", file.id, problem)
    for model in _rows(services, Model, Model.name):
        if model.prefix is not None and (problem := _folder_problem(services, model.prefix, model.content, content)):
            yield Finding("model", model.name, problem)
    for checkpoint in _rows(services, Checkpoint, Checkpoint.id):
        folder = f"{checkpoint.prefix}/model"
        if problem := _folder_problem(services, folder, checkpoint.content, content):
            yield Finding("checkpoint", checkpoint.model_name, problem)
    with services.database.read() as session:
        unfinished = session.execute(select(Job.id, Job.attempt).where(Job.status.in_(ACTIVE))).all()
    for job_id, attempt in unfinished:
        last = _last_attempt(services, job_id)
        if last > attempt:
            yield Finding("job", job_id, f"has objects of attempt {last}, and its row knows {attempt}")


def repair(services: Services, finding: Finding) -> None:
    """Delete a row whose objects are gone, or let a job's next attempt come after those whose objects are there.

    A job that needs a deleted file or model fails and says so. Pruning removes what is left of the objects.
    """
    with services.database.write() as session:
        if finding.kind == "job":
            attempt = _last_attempt(services, finding.name)
            session.execute(update(Job).where(Job.id == finding.name).values(attempt=attempt))
            return
        table, name = NAMES[finding.kind]
        artifacts.forget(session, finding.name)
        session.delete(session.scalars(select(table).where(name == finding.name)).one())


def drop_webhooks(services: Services) -> int:
    """End all pending webhook deliveries: those that were due when an old dump was made have been sent since.

    Returns their number.
    """
    pending = update(WebhookDelivery).where(WebhookDelivery.eligible_at >= 0.0)
    with services.database.write() as session:
        return len(session.scalars(pending.values(eligible_at=None).returning(WebhookDelivery.id)).all())


def _rows(services: Services, table: type[Row], key: InstrumentedAttribute[str]) -> Iterator[Row]:
    """All rows of a table, some at a time."""
    last = ""
    while True:
        with services.database.read() as session:
            rows = session.scalars(select(table).where(key > last).order_by(key).limit(BATCH)).all()
        yield from rows
        if len(rows) < BATCH:
            return
        last = getattr(rows[-1], key.key)


def _file_problem(services: Services, file: File, content: bool) -> str | None:
    size = services.storage.size(file.key)
    if size is None:
        return "has no content in the object store"
    if size != file.bytes:
        return f"has {size} bytes in the object store and should have {file.bytes}"
    return _damage(lambda folder: fetch_file(services.storage, file, folder / "file")) if content else None


def _folder_problem(services: Services, prefix: str, expected: FolderContent, content: bool) -> str | None:
    try:
        expected.require_complete(services.storage.list(prefix))
    except ContentDamaged as damage:
        return f"is not whole: {damage}"
    if not content:
        return None
    return _damage(lambda folder: fetch_folder(services.storage, prefix, expected, folder / "content"))


def _damage(fetch: Callable[[Path], None]) -> str | None:
    """Read content into a temporary folder. Returns what is wrong with it, if anything."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetch(Path(folder))
        except ContentDamaged as damage:
            return f"is damaged: {damage}"
    return None


def _last_attempt(services: Services, job_id: str) -> int:
    """The number of the last attempt whose objects are in the store; 0 if there is none."""
    matches = (ATTEMPT.match(key) for key, _ in services.storage.list(f"jobs/{job_id}"))
    return max((int(match[1]) for match in matches if match), default=0)
