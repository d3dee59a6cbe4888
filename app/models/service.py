"""The HTTP operations on models."""

from collections.abc import Iterator, Sequence

import structlog
from sqlalchemy.orm import Session

from app.archive import Entry, folder, tar
from app.broker import Broker, Lane
from app.database import Database
from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.service import result
from app.errors import Conflict, Forbidden, NotFound, ServiceError, TooMany
from app.files import repository as files
from app.jobs import checkpoints as job_checkpoints
from app.jobs import queries
from app.jobs.states import ACTIVE
from app.jobs.tables import Checkpoint, Job
from app.models import repository
from app.models.schemas import Lineage, LineageStep
from app.models.tables import Model
from app.projects.service import require_room
from app.storage import Storage
from app.stored_content import ContentDamaged, FolderContent, gone

log = structlog.get_logger(__name__)

FORGET_BATCH = 100
"""Maximum number of checkpoints that one transaction deletes."""
MAX_MERGES = 4
"""Maximum number of models of a project that wait to be merged."""
MERGED_KEPT_SECONDS = 24 * 3600
"""How long a merged model is kept."""


def _model_not_found(name: str) -> NotFound:
    return NotFound(f"The model '{name}' does not exist", param="model", code="model_not_found")


class Models:
    """List, find, download and delete models."""

    def __init__(self, database: Database, storage: Storage, broker: Broker) -> None:
        self.database, self.storage, self.broker = database, storage, broker

    def page(self, project: str, *, after: str | None, limit: int) -> list[Model]:
        """Up to `limit` + 1 models, newest first. Raises `NotFound` if there is no model `after`."""
        with self.database.read() as session:
            after_model = None if after is None else repository.get(session, project, after)
            if after is not None and after_model is None:
                raise _model_not_found(after)
            return repository.page(session, project, after=after_model, limit=limit)

    def get(self, project: str, name: str) -> Model:
        with self.database.read() as session:
            model = repository.get(session, project, name)
        if model is None:
            raise _model_not_found(name)
        return model

    def download(self, project: str, name: str) -> Iterator[bytes]:
        """The folder of a trained model or a checkpoint, as a tar stream."""
        with self.database.read() as session:
            model, prefix = self._trained(session, project, name)
        return tar(self._files(project, model, prefix))

    def _files(self, project: str, model: repository.ResolvedModel, prefix: str) -> Iterator[Entry]:
        """The files of a trained model. Raises `Gone` at once if they are not all there."""
        try:
            return folder(self.storage, prefix, model.content)
        except ContentDamaged as damage:
            with self.database.read() as session:
                self._trained(session, project, model.name)  # it may have been deleted a moment ago
            raise gone("model", model.name, damage, "model") from damage

    def download_merged(self, project: str, name: str, dtype: str, *, may_make: bool = True) -> Iterator[bytes] | None:
        """The model with its adapter merged into its weights, as a tar stream; None while a worker merges it.

        Raises `Forbidden` if it would have to be made, and may not or has no room. Raises `TooMany` if the project
        already waits for several.
        """
        with self.database.read() as session:
            model, prefix = self._trained(session, project, name)
        files = self._files(project, model, prefix)
        if model.kind != "adapter":
            return tar(files)  # it has all weights already
        with self.database.write() as session:
            method = repository.prequantized(session, model.base_model)
            if method is not None:
                message = f"'{model.base_model}' is quantised ({method}). No adapter can be merged into its weights."
                raise ServiceError(message, param="format", code="not_mergeable")
            subject = f"{prefix} {dtype}"
            if artifacts.find(session, artifacts.MERGE, subject) is None:
                _require_merge(session, project, model.base_model, may_make=may_make)
            artifact = artifacts.ensure(
                session,
                artifacts.MERGE,
                subject,
                project=project,
                owner=name,
                base_model=model.base_model,
                arguments={"model": name, "dtype": dtype},
            )
            merged = result(session, artifact)
        if merged is None:
            self.broker.wake(Lane.CPU)
            return None
        content = FolderContent(**{name: merged.get(name) for name in ("objects", "bytes", "sha256")})
        try:
            return tar(folder(self.storage, merged["prefix"], content))
        except ContentDamaged as damage:  # it is made again, as after a day
            log.warning("merged model lost", artifact=artifact.id, reason=str(damage))
            with self.database.write() as session:
                artifacts.forget_one(session, artifact.id)
            self.storage.delete_folder(merged["prefix"])
            return self.download_merged(project, name, dtype, may_make=may_make)

    @staticmethod
    def _trained(session: Session, project: str, name: str) -> tuple[repository.ResolvedModel, str]:
        """(a trained model or checkpoint, its folder in the object store)."""
        model = repository.find(session, project, name)
        if model is None:
            raise _model_not_found(name)
        if model.prefix is None:
            raise ServiceError(
                f"'{name}' is a base model. Only models trained here can be downloaded.",
                param="model",
                code="not_downloadable",
            )
        return model, model.prefix

    def lineage(self, project: str, name: str) -> Lineage:
        """How a model was made: each job with its files, spec and metrics, starting from the base model."""
        steps: list[LineageStep] = []
        visited: set[str] = set()
        current: str | None = name
        with self.database.read() as session:
            root = repository.find(session, project, name)
            if root is None:
                raise _model_not_found(name)
            while current is not None and current not in visited:
                visited.add(current)
                job = repository.job_of(session, project, current)
                if job is None:
                    break
                steps.append(LineageStep.of(current, job, files.hashes(session, project, queries.files_of(job))))
                current = job.model
            revision = repository.version(session, root.base_model)
        return Lineage(model=name, base_model=root.base_model, base_revision=revision, steps=steps[::-1])

    def delete(self, project: str, name: str) -> None:
        """Delete a trained model and the checkpoints of its training, or one checkpoint.

        Rows go first, so that nobody can reach a half-deleted folder. Raises `Conflict` if an unfinished job or another
        model needs it. Checkpoints that something needs stay when their model goes.
        """
        with self.database.write() as session:
            model = repository.get_for_deletion(session, project, name)
            if model is not None:
                prefixes = _delete_model(session, model)
            else:
                prefixes = _delete_checkpoint(session, project, name)
        for prefix in prefixes:
            self.storage.delete_folder(prefix)

    def forget_checkpoints(self, seconds: float) -> int:
        """Delete the checkpoints of jobs that ended more than `seconds` ago, unless something needs them.

        Returns the number of folders that went with them.
        """
        deleted, last = 0, None
        while True:
            with self.database.read() as session:
                old = job_checkpoints.old(session, seconds, last, FORGET_BATCH)
            if not old:
                return deleted
            with self.database.write() as session:
                unused = _delete_unused(session, old)
            for prefix in unused:
                self.storage.delete_folder(prefix)
            deleted, last = deleted + len(unused), old[-1]

    def forget_merged(self) -> None:
        """Delete merged models that are older than a day. The next download merges again."""
        with self.database.write() as session:
            old = artifacts.forget_old(session, artifacts.MERGE, MERGED_KEPT_SECONDS)
        for artifact_id in old:
            self.storage.delete_folder(f"merged/{artifact_id}")


def _delete_model(session: Session, model: Model) -> list[str]:
    """Delete the rows of a model and of its training's unused checkpoints. Returns the folders of both."""
    if model.prefix is None:
        raise ServiceError(
            f"'{model.name}' is a base model that a worker registered. It cannot be deleted over HTTP.",
            param="model",
            code="not_deletable",
        )
    _require_unused(session, model.name)
    folders = [model.prefix, *_delete_merged(session, model.name)]
    session.delete(model)
    session.flush()
    if model.job_id is not None:
        folders += _delete_unused(session, job_checkpoints.of_job(session, model.job_id))
    return folders


def _delete_checkpoint(session: Session, project: str, name: str) -> list[str]:
    """Delete the row of a checkpoint. Returns its folders. Raises `NotFound`, or `Conflict` if something needs it."""
    checkpoint = job_checkpoints.named(session, project, name)
    if checkpoint is None:
        raise _model_not_found(name)
    job = session.get_one(Job, checkpoint.job_id)
    if job.status in ACTIVE:
        message = f"'{name}' is a checkpoint of {job.id}, which has not ended and may resume from it. End it first."
        raise Conflict(message, param="model", code="model_in_use")
    job_checkpoints.lock(session, [checkpoint.id])
    _require_unused(session, name)
    return _delete_unused(session, [checkpoint])


def _delete_unused(session: Session, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Delete the rows of those `checkpoints` that no unfinished job and no model needs. Returns their folders."""
    job_checkpoints.lock(session, [checkpoint.id for checkpoint in checkpoints])
    unused = [checkpoint for checkpoint in checkpoints if not repository.users_of(session, checkpoint.model_name)]
    job_checkpoints.forget(session, [checkpoint.id for checkpoint in unused])
    merged = [folder for checkpoint in unused for folder in _delete_merged(session, checkpoint.model_name)]
    return [checkpoint.prefix for checkpoint in unused] + merged


def _delete_merged(session: Session, name: str) -> list[str]:
    """Delete the rows of the merged forms of a model. Returns their folders."""
    return [f"merged/{artifact_id}" for artifact_id in artifacts.forget(session, name)]


def _require_merge(session: Session, project: str, base_model: str, *, may_make: bool) -> None:
    """Raise `Forbidden` or `TooMany` if a project may not have one more model merged."""
    if not may_make:
        message = "This model was not merged yet. To have it merged needs a key with the scope 'write'."
        raise Forbidden(message, code="insufficient_scope")
    if artifacts.pending_merges(session, project) >= MAX_MERGES:
        message = f"{MAX_MERGES} models of this project are being merged. Ask again when some are done."
        raise TooMany(message, 10, code="too_many_merges")
    base = repository.get(session, project, base_model)
    require_room(session, project, (base.details if base is not None else {}).get("bytes") or 0)


def _require_unused(session: Session, name: str) -> None:
    """Raise `Conflict` if an unfinished job, another model or a checkpoint needs the model."""
    users = repository.users_of(session, name, 5)
    if users:
        message = f"'{name}' is needed by {', '.join(users)}. End or delete these first."
        raise Conflict(message, param="model", code="model_in_use")
