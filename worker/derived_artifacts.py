"""CPU lane: make dataset reports and merged models. What needs torch or a tokenizer runs in a process of its own."""

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from app.derived_artifacts import repository
from app.derived_artifacts.tables import DerivedArtifact
from app.files.tables import File
from app.models import repository as models
from app.services import Services
from app.spec.datasets.check import survey
from app.spec.datasets.mapping import Mapping
from worker.base_models import BaseModels, ModelUnavailable
from worker.counting import Count, count, place_tokenizer, run_program
from worker.lease import Lease, LeaseLost
from worker.model_folder import ModelGone, fetch_model, find_model
from worker.work import work_folder

log = structlog.get_logger(__name__)


class ArtifactFailed(Exception):
    """What the user must know about why an artifact cannot be made."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = {"code": code, "message": message, "param": param}


def make_artifact(services: Services, base_models: BaseModels, artifact: DerivedArtifact) -> None:
    """Make an artifact whose lease this worker has, to its end."""
    with (
        tempfile.TemporaryDirectory(dir=work_folder(services), ignore_cleanup_errors=True) as name,
        Lease(services.database, repository.ARTIFACTS, artifact.id, artifact.attempt) as lease,
    ):
        work = _Work(services, base_models, artifact, Path(name), lease)
        try:
            result = work.report() if artifact.kind == repository.REPORT else work.merge()
            if not _finish(lease, artifact, result=result):
                raise LeaseLost
        except ArtifactFailed as failed:
            _finish(lease, artifact, error=failed.error)
        except LeaseLost:
            work.undo()
            log.warning("artifact lost", artifact=artifact.id)
        except Exception as error:  # the store, the disk: another attempt may do better, and they are counted
            with suppress(Exception):
                work.undo()
            log.error("artifact failed", artifact=artifact.id, kind=artifact.kind, exc_info=error)
            reason = f"The worker failed ({type(error).__name__})."
            with suppress(LeaseLost):
                lease.write(lambda session: repository.recover(session, artifact, reason))


def _finish(lease: Lease, artifact: DerivedArtifact, **outcome: dict[str, Any]) -> bool:
    return lease.write(lambda session: repository.finish(session, artifact.id, artifact.attempt, **outcome))


class _Work:
    """One attempt at one artifact, in `folder`."""

    def __init__(
        self, services: Services, base_models: BaseModels, artifact: DerivedArtifact, folder: Path, lease: Lease
    ) -> None:
        self.services, self.base_models, self.artifact, self.folder, self.lease = (
            services, base_models, artifact, folder, lease,
        )  # fmt: skip
        self.prefix: str | None = None

    def undo(self) -> None:
        """Remove what nobody will find."""
        if self.prefix is not None:
            self.services.storage.delete_folder(self.prefix)

    def report(self) -> dict[str, Any]:
        """A dataset report, with what was found before where that is only to be counted in tokens."""
        asked = self.artifact.arguments
        with self.services.database.read() as session:
            file = session.get(File, asked["file_id"])
            before = repository.find(session, repository.REPORT, asked["file_id"])
        if file is None:
            raise ArtifactFailed("file_not_found", "The file was deleted.", "file_id")
        dataset = self.folder / "dataset"
        try:
            self.services.storage.get_file(file.key, dataset)
        except FileNotFoundError:
            raise ArtifactFailed("file_not_found", "The file was deleted.", "file_id") from None
        if "model" not in asked:
            mapping = None if file.mapping is None else Mapping.model_validate(file.mapping)
            with dataset.open("rb") as stream:
                return survey(stream, mapping).as_json()
        found = dict((before.result if before is not None else None) or {})
        with self.services.database.read() as session:
            model = models.find(session, self.artifact.project, asked["model"])
        if model is None or not found:
            raise ArtifactFailed("model_not_found", f"The model '{asked['model']}' was deleted.", "model")
        try:
            place_tokenizer(self.services, self.base_models, model, self.folder / "model")
        except ModelUnavailable as error:
            raise ArtifactFailed("model_unavailable", str(error), "model") from error
        mapping = asked.get("mapping", file.mapping)
        if mapping != file.mapping:  # what was found before was read in another way
            with dataset.open("rb") as stream:
                found = survey(stream, mapping and Mapping.model_validate(mapping)).as_json()
            if not found["valid"]:
                return found
        recipe = {
            "need": asked["need"],
            "max_length": asked["max_length"],
            "loss_on": asked.get("loss_on", "answers"),
            "mapping": mapping,
            "rendering": asked.get("rendering", {}),
            "truncation": asked.get("truncation", "keep_end"),
        }
        (counted,) = count(self.folder, [Count(dataset, recipe, found["kept"])], self.lease)
        _require(counted)
        told = {name: asked[name] for name in ("model", "max_length", "method")}
        return found | {"tokens": told | counted}

    def merge(self) -> dict[str, Any]:
        """A made adapter and its base as one model; returns where it is in the object store."""
        name, dtype = self.artifact.arguments["model"], self.artifact.arguments["dtype"]
        storage = self.services.storage
        try:
            with self.services.database.read() as session:
                found = find_model(session, self.artifact.project, name)
            fetch_model(storage, self.base_models, found, self.folder)
        except ModelGone as error:
            raise ArtifactFailed("model_not_found", str(error), "model") from error
        except ModelUnavailable as error:
            raise ArtifactFailed("model_unavailable", str(error), "model") from error
        (self.folder / "merge.json").write_text(json.dumps({"dtype": dtype}))
        _require(run_program("worker.trainer.merge", self.folder, self.lease))
        self.prefix = f"merged/{self.artifact.id}/attempt-{self.artifact.attempt}"
        storage.put_folder(self.prefix, self.folder / "output")
        shutil.rmtree(self.folder / "output")
        return {"prefix": self.prefix}


def _require(found: dict[str, Any]) -> None:
    """Raise `ArtifactFailed` for the error that a program of the trainer told."""
    if "error" in found:
        raise ArtifactFailed(found["error"]["code"], found["error"]["message"], found["error"]["param"])
