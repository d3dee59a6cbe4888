"""What can be done with models."""

from collections.abc import Iterator

from sqlalchemy.orm import Session

from app.archive import folder, tar
from app.broker import Broker, Lane
from app.database import Database
from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.service import result
from app.errors import Conflict, NotFound, ServiceError
from app.files import repository as files
from app.jobs import queries
from app.models import repository
from app.models.schemas import Lineage, LineageStep
from app.models.tables import Model
from app.storage import Storage

MERGED_KEPT_SECONDS = 24 * 3600


def not_found(name: str) -> NotFound:
    return NotFound(f"The model '{name}' does not exist", param="model", code="model_not_found")


class Models:
    """List, find, download and delete models."""

    def __init__(self, database: Database, storage: Storage, broker: Broker) -> None:
        self.database, self.storage, self.broker = database, storage, broker

    def list(self, project: str) -> list[Model]:
        with self.database.read() as session:
            return repository.listed(session, project)

    def get(self, project: str, name: str) -> Model:
        with self.database.read() as session:
            model = repository.get(session, project, name)
        if model is None:
            raise not_found(name)
        return model

    def download(self, project: str, name: str) -> Iterator[bytes]:
        """The folder of a made model or a checkpoint, as a tar stream."""
        with self.database.read() as session:
            return tar(folder(self.storage, self._made(session, project, name)[1]))

    def download_merged(self, project: str, name: str, dtype: str) -> Iterator[bytes] | None:
        """The model with its adapter in its weights, as a tar stream; None while a worker makes it."""
        with self.database.write() as session:
            found, prefix = self._made(session, project, name)
            if found.kind != "adapter":
                return tar(folder(self.storage, prefix))  # its weights are whole
            method = repository.prequantized(session, found.base_model)
            if method is not None:
                message = f"'{found.base_model}' is quantised ({method}): nothing can be merged into such weights."
                raise ServiceError(message, param="format", code="not_mergeable")
            task = artifacts.ensure(
                session,
                artifacts.MERGE,
                f"{prefix} {dtype}",
                project=project,
                owner=name,
                base_model=found.base_model,
                arguments={"model": name, "dtype": dtype},
            )
        made = result(task)
        if made is None:
            self.broker.wake(Lane.CPU)
            return None
        return tar(folder(self.storage, made["prefix"]))

    @staticmethod
    def _made(session: Session, project: str, name: str) -> tuple[repository.ResolvedModel, str]:
        found = repository.find(session, project, name)
        if found is None:
            raise not_found(name)
        if found.prefix is None:
            raise ServiceError(
                f"'{name}' is a base model; only models made here can be downloaded.",
                param="model",
                code="not_downloadable",
            )
        return found, found.prefix

    def lineage(self, project: str, name: str) -> Lineage:
        """How a model came to be: from its base model on, each job with its files, its spec and what it measured."""
        steps: list[LineageStep] = []
        seen: set[str] = set()
        current: str | None = name
        with self.database.read() as session:
            root = repository.find(session, project, name)
            if root is None:
                raise not_found(name)
            while current is not None and current not in seen:
                seen.add(current)
                job = repository.job_of(session, project, current)
                if job is None:
                    break
                steps.append(LineageStep.of(current, job, files.hashes(session, project, queries.files_of(job))))
                current = job.model
            revision = repository.version(session, root.base_model)
        return Lineage(model=name, base_model=root.base_model, base_revision=revision, steps=steps[::-1])

    def delete(self, project: str, name: str) -> None:
        """Delete a made model: its row first, so that nobody can reach a folder that is half gone.

        Raises `Conflict` while an unfinished job or another model needs it.
        """
        with self.database.write() as session:
            model = repository.to_delete(session, project, name)
            if model is None:
                raise not_found(name)
            if model.prefix is None:
                raise ServiceError(
                    f"'{name}' is a base model, registered by a worker; it cannot be deleted over HTTP.",
                    param="model",
                    code="not_deletable",
                )
            users = repository.users_of(session, name)
            if users:
                message = f"'{name}' is needed by {', '.join(users[:5])}. End or delete what needs it first."
                raise Conflict(message, param="model", code="model_in_use")
            merged = [f"merged/{task.id}" for task in artifacts.of_owner(session, name)]
            artifacts.forget(session, name)
            session.delete(model)
        for prefix in (model.prefix, *merged):
            self.storage.delete_folder(prefix)

    def forget_merged(self) -> None:
        """Remove merged models that were made a day ago: whoever needs one again has it made again."""
        with self.database.write() as session:
            old = artifacts.finished_before(session, artifacts.MERGE, MERGED_KEPT_SECONDS)
            prefixes = [f"merged/{task.id}" for task in old]
            for task in old:
                session.delete(task)
        for prefix in prefixes:
            self.storage.delete_folder(prefix)
