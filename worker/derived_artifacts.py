"""CPU lane: make dataset reports and merged models. Work with torch or a tokenizer runs in a process of its own."""

import json
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import structlog

from app.derived_artifacts import repository
from app.derived_artifacts.repository import ARTIFACTS
from app.derived_artifacts.tables import DerivedArtifact
from app.files.tables import File
from app.models import repository as models
from app.programs import command
from app.services import Services
from app.spec.json_types import JsonObject
from app.stored_content import GONE, ContentDamaged, fetch_file, store_folder
from worker.base_models import BaseModels
from worker.counting import CountRequest, count, place_tokenizer
from worker.hub import ModelUnavailable
from worker.lease import AskedToStop, Lease, LeaseLost
from worker.model_folder import ModelGone, fetch_model, find_model
from worker.outage import fault
from worker.processes import printed_result, trainer_environment
from worker.reader.client import Reader, TooCostly
from worker.waiting import briefly, in_thread, run_process
from worker.work import work_folder

log = structlog.get_logger(__name__)

UNDO_SECONDS = 5.0
"""The longest wait for the removal of what a failed attempt has uploaded. Pruning removes the rest."""


class ArtifactFailed(Exception):
    """An artifact cannot be made for a reason that the user can change. `error` has `code`, `message` and `param`."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = {"code": code, "message": message, "param": param}


def make_artifact(
    services: Services, base_models: BaseModels, reader: Reader, artifact: DerivedArtifact, stopping: threading.Event
) -> None:
    """Make an artifact whose lease this worker holds, and write its result or its error.

    Once `stopping` is set, the artifact is given back.
    """
    with (
        tempfile.TemporaryDirectory(dir=work_folder(services), ignore_cleanup_errors=True) as name,
        Lease(services.database, ARTIFACTS, artifact.id, artifact.attempt, stopping.is_set) as lease,
    ):
        artifact_attempt = _ArtifactAttempt(services, base_models, reader, artifact, Path(name), lease)
        try:
            is_report = artifact.kind == repository.REPORT
            result = in_thread(artifact_attempt.report if is_report else artifact_attempt.merge, lease.check)
            if not _finish(lease, artifact, result=result):
                raise LeaseLost
        except ArtifactFailed as failed:
            _finish(lease, artifact, error=failed.error)
        except LeaseLost:
            briefly(artifact_attempt.undo, UNDO_SECONDS)
            log.warning("artifact lost", artifact=artifact.id)
        except AskedToStop:  # pruning removes what it has uploaded
            with suppress(LeaseLost):
                lease.write(lambda session: ARTIFACTS.release(session, artifact.id, artifact.attempt, pause=0.0))
        except Exception as error:
            briefly(artifact_attempt.undo, UNDO_SECONDS)
            log.error("artifact failed", artifact=artifact.id, kind=artifact.kind, exc_info=error)
            reason = f"The worker failed ({type(error).__name__})."
            with suppress(LeaseLost):
                if fault(error) is not None:
                    lease.write(lambda session: repository.set_back(session, artifact))
                else:
                    lease.write(lambda session: repository.recover(session, artifact, reason))


def _finish(lease: Lease, artifact: DerivedArtifact, **outcome: JsonObject) -> bool:
    return lease.write(lambda session: repository.finish(session, artifact.id, artifact.attempt, **outcome))


class _ArtifactAttempt:
    """One attempt at one artifact, in `folder`."""

    def __init__(
        self,
        services: Services,
        base_models: BaseModels,
        reader: Reader,
        artifact: DerivedArtifact,
        folder: Path,
        lease: Lease,
    ) -> None:
        self.services, self.base_models, self.reader = services, base_models, reader
        self.artifact, self.folder, self.lease = artifact, folder, lease
        self.prefix: str | None = None

    def undo(self) -> None:
        """Delete the objects that this attempt has uploaded."""
        if self.prefix is not None:
            self.services.storage.delete_folder(self.prefix)

    def report(self) -> JsonObject:
        """Make a dataset report. A report in tokens extends the report of the file that was made before it."""
        try:
            return self._report()
        except TooCostly as error:
            raise ArtifactFailed("file_too_costly", str(error), "file_id") from error

    def _survey(self, dataset: Path, mapping: JsonObject | None) -> JsonObject:
        task = {"name": "survey", "dataset": str(dataset), "mapping": mapping}
        report: JsonObject = self.reader.do(self.folder, task, dataset.stat().st_size, self.lease.check)
        return report

    def _report(self) -> JsonObject:
        arguments = self.artifact.arguments
        with self.services.database.read() as session:
            file = session.get(File, arguments["file_id"])
            earlier = repository.find(session, repository.REPORT, arguments["file_id"])
        if file is None:
            raise ArtifactFailed("file_not_found", "The file was deleted.", "file_id")
        dataset = self.folder / "dataset"
        try:
            fetch_file(self.services.storage, file, dataset)
        except ContentDamaged as damage:
            raise ArtifactFailed(GONE, f"The file cannot be read: {damage}.", "file_id") from damage
        if "model" not in arguments:
            return self._survey(dataset, file.mapping)
        report = dict((earlier.result if earlier is not None else None) or {})
        with self.services.database.read() as session:
            model = models.find(session, self.artifact.project, arguments["model"])
        if model is None:
            raise ArtifactFailed("model_not_found", f"The model '{arguments['model']}' was deleted.", "model")
        try:
            place_tokenizer(self.services, self.base_models, model, self.folder / "model", self.lease.check)
        except ModelGone as error:
            raise ArtifactFailed(GONE if error.is_lost else "model_not_found", str(error), "model") from error
        except ModelUnavailable as error:
            raise ArtifactFailed("model_unavailable", str(error), "model") from error
        mapping = arguments.get("mapping", file.mapping)
        if not report or mapping != file.mapping:  # there is no earlier report, or it read the file in another way
            report = self._survey(dataset, mapping)
            if not report["valid"]:
                return report
        recipe = {
            "need": arguments["need"],
            "max_length": arguments["max_length"],
            "loss_on": arguments.get("loss_on", "answers"),
            "mapping": mapping,
            "rendering": arguments.get("rendering", {}),
            "truncation": arguments.get("truncation", "keep_end"),
            "pairs": arguments.get("pairs", {}),
        }
        (counted,) = count(self.reader, self.folder, [CountRequest(dataset, recipe, report["kept"])], self.lease.check)
        _require(counted)
        settings = {name: arguments[name] for name in ("model", "max_length", "method")}
        return report | {"tokens": settings | counted}

    def merge(self) -> JsonObject:
        """Merge an adapter into its base model. Returns the `prefix` of the result in the object store."""
        name, dtype = self.artifact.arguments["model"], self.artifact.arguments["dtype"]
        storage = self.services.storage
        try:
            with self.services.database.read() as session:
                stack = find_model(session, self.artifact.project, name)
            fetch_model(storage, self.base_models, stack, self.folder, self.lease.check)
        except ModelGone as error:
            raise ArtifactFailed(GONE if error.is_lost else "model_not_found", str(error), "model") from error
        except ModelUnavailable as error:
            raise ArtifactFailed("model_unavailable", str(error), "model") from error
        (self.folder / "merge.json").write_text(json.dumps({"dtype": dtype}))
        _require(self._run_merge())
        self.prefix = prefix = f"merged/{self.artifact.id}/attempt-{self.artifact.attempt}"
        content = store_folder(storage, prefix, self.folder / "output")
        shutil.rmtree(self.folder / "output")
        return {"prefix": prefix, **content.as_columns()}

    def _run_merge(self) -> JsonObject:
        """Run the program that merges. Returns the JSON of the last line that it prints."""
        program, log = command("worker.trainer.merge", str(self.folder)), self.folder / "log"
        with log.open("wb") as stderr:
            environment = trainer_environment() | {"HF_HUB_OFFLINE": "1"}
            status, printed = run_process(program, self.lease.check, env=environment, stderr=stderr)
        result: JsonObject = printed_result(status, printed, log)
        return result


def _require(result: JsonObject) -> None:
    """Raise `ArtifactFailed` if a program of the trainer has returned an error."""
    if "error" in result:
        raise ArtifactFailed(result["error"]["code"], result["error"]["message"], result["error"]["param"])
