"""CPU lane: check the files of a new job, then queue the job or fail it. The error names the line and the field."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.orm import Session

from app.broker import Lane
from app.estimates.service import needs
from app.files.tables import File
from app.jobs import events as job_events
from app.jobs import transitions
from app.jobs.kinds import EVALUATION_JOB, KINDS, LABELLING_JOB, AnySpec
from app.jobs.queue import JOBS
from app.jobs.states import Actor, Status
from app.jobs.tables import Job
from app.models import repository as models
from app.services import Services
from app.spec.datasets.example import Kind
from app.spec.datasets.report import Outline
from app.spec.evaluation import EvaluationSpec
from app.spec.hyperparameters import DEFAULT_MAX_LENGTH
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec
from app.work_queue import PROGRESS
from worker import evaluation_run, labelling_run
from worker.base_models import BaseModels, has_chat_template
from worker.counting import CountRequest, count, place_tokenizer
from worker.input_file import InputLost, fetch_input
from worker.lease import AskedToStop, JobLease, Lease, LeaseLost
from worker.model_files import folder_at
from worker.model_folder import ModelGone
from worker.outage import fault
from worker.reader.client import Reader, TooCostly
from worker.waiting import in_thread
from worker.work import work_folder

log = structlog.get_logger(__name__)

RENDERINGS: dict[str, Callable[[Any, str, str, str, Session], JsonObject]] = {
    EVALUATION_JOB.name: evaluation_run.rendering_of,
    LABELLING_JOB.name: labelling_run.rendering_of,
}
"""How the model of a side renders conversations, by the job's kind."""
SAMPLE = 200
"""Maximum number of rows of a file that are rendered for the model before the job waits for a GPU."""


def validate(services: Services, base_models: BaseModels, reader: Reader, job: Job, stopping: threading.Event) -> None:
    """Check the files of `job`, whose lease this worker holds. Queue the job, or fail it.

    Once `stopping` is set, the check is given back.
    """
    queued = False
    with (
        JobLease(services.database, job.id, job.attempt, stopping.is_set) as lease,
        suppress(LeaseLost),
        tempfile.TemporaryDirectory(dir=work_folder(services), ignore_cleanup_errors=True) as folder,
    ):
        attempt = _Check(services, base_models, reader, job, lease, Path(folder))
        try:
            queued = in_thread(attempt.run, lease.check)
        except AskedToStop:
            lease.write(lambda session: JOBS.release(session, job.id, job.attempt, pause=0.0))
    if queued:
        services.broker.wake(Lane.GPU)


class _Invalid(Exception):
    """The file of `field` is not usable for the job. `param` is the field that the error names."""

    def __init__(self, field: str, reason: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(reason)
        self.field, self.reason, self.code, self.param = field, reason, code, param or field


class _Check:
    """The check of the files of one job, in `folder`."""

    def __init__(
        self, services: Services, base_models: BaseModels, reader: Reader, job: Job, lease: Lease, folder: Path
    ) -> None:
        self.services, self.base_models, self.reader = services, base_models, reader
        self.job, self.lease, self.folder = job, lease, folder
        self.kind = KINDS[job.kind]
        self.spec = self.kind.read(job.spec)
        self.outlines: dict[str, Outline] = {}
        self.warnings: list[str] = []

    def run(self) -> bool:
        """Check all files and queue the job, or fail it. Returns whether the job was queued."""
        try:
            for field, file_id in self.spec.files():
                self._fetch(field, file_id)
            self._check_structure()
            self._check_rendering()
        except _Invalid as invalid:
            self._fail(invalid)
            return False
        except (LeaseLost, AskedToStop):
            raise
        except Exception as error:
            log.error("files could not be checked", job=self.job.id, exc_info=error)
            give_back, reason = transitions.set_back, fault(error)
            if reason is None:
                give_back, reason = transitions.recover, "The files could not be read."
            self.lease.write(lambda session: give_back(session, self.job, Actor.VALIDATOR, reason))
            return False
        return self.lease.write(self._queue)

    def _queue(self, session: Session) -> bool:
        job = self.job
        queued = transitions.transition(
            session,
            job.id,
            Status.VALIDATING,
            Status.QUEUED,
            actor=Actor.VALIDATOR,
            attempt=job.attempt,
            **PROGRESS,  # the training counts its own
            **self._needs(session),
            message="Files validated, job queued: "
            + "; ".join(f"{field}: {outline.summary}" for field, outline in self.outlines.items()),
        )
        for text in self.warnings if queued else ():
            job_events.add(session, job.id, text, level="warn")
        return queued

    def _needs(self, session: Session) -> dict[str, Any]:
        """The columns of a training that say what it needs. Empty for other jobs."""
        if not isinstance(self.spec, JobSpec):
            return {}
        return needs(session, self.job.project, self.spec, self.job.base_model, self.outlines)

    def _path(self, file_id: str) -> Path:
        return self.folder / file_id

    def _fetch(self, field: str, file_id: str) -> None:
        """Download a file. Raises `_Invalid`."""
        if self._path(file_id).exists():
            return
        with self.services.database.read() as session:
            row = session.get(File, file_id)
        try:
            fetch_input(self.services.storage, row, file_id, self._path(file_id))
        except InputLost as lost:
            raise _Invalid(field, str(lost)) from lost

    def _check_structure(self) -> None:
        """Check that the rows of all files fit the job. Raises `_Invalid`.

        Warns of validation rows whose prompt is also in the training rows. They partly measure memorisation.
        """
        files, trained = list[JsonObject](), dict[str, list[str]]()
        for field, file_id in self.spec.files():
            need, mapping = self.spec.needs(field), self.spec.reads(field)
            fields = {"field": field, "path": str(self._path(file_id)), "needs": need}
            files.append(fields | {"mapping": None if mapping is None else mapping.model_dump(mode="json")})
            if field.endswith("validation_file") and isinstance(self.spec, JobSpec):
                trained[field] = self.spec.training_fields(field.replace("validation_file", "training_file"))
        size = sum(self._path(file_id).stat().st_size for _, file_id in self.spec.files())
        task = {"name": "check", "files": files, "trained": trained}
        try:
            checked = self.reader.do(self.folder, task, size, self.lease.check)
        except TooCostly as costly:
            raise _Invalid(files[0]["field"], str(costly)) from costly
        if (invalid := checked.get("invalid")) is not None:
            raise _Invalid(invalid["field"], invalid["reason"])
        self.outlines = {field: Outline(**outline) for field, outline in checked["outlines"].items()}
        for field, repeated in checked["repeats"].items():
            if repeated:
                self.warnings.append(
                    f"{field}: {repeated} of {self.outlines[field].kept} rows have a prompt that is also in the "
                    "training file. Their metrics partly measure memorisation."
                )

    def _check_rendering(self) -> None:
        """Check on a sample that the model's tokenizer and chat template accept the rows. Raises `_Invalid`.

        If this machine does not have the model, the job itself finds the errors later.
        """
        for name, requests in self._to_render():
            with self.services.database.read() as session:
                model = models.find(session, self.job.project, name)
            if model is None or not requests or model.base_model not in self.base_models.folders():
                continue
            folder = self.folder / f"rendered-{len(list(self.folder.iterdir()))}"
            folder.mkdir()
            try:
                place_tokenizer(self.services, self.base_models, model, folder / "model", self.lease.check)
            except ModelGone as gone:
                raise _Invalid(requests[0][0], str(gone), "model_not_found", "model") from gone
            if not has_chat_template(folder_at(folder / "model")):
                continue
            try:
                counted = count(self.reader, folder, [request for _, request in requests], self.lease.check)
            except TooCostly as costly:
                raise _Invalid(requests[0][0], str(costly)) from costly
            for (field, _), result in zip(requests, counted, strict=True):
                if error := result.get("error"):
                    param = error["param"] if error["param"] in ("model", "loss_on") else field
                    raise _Invalid(field, error["message"], error["code"], param)
                for refused in result["refused"]:
                    if not result["sampled_rows"]:
                        raise _Invalid(field, f"No row can be trained on. {refused['detail']}", "chat_template_error")
                    self.warnings.append(
                        f"{field}: {refused['rows']} rows in a sample of at most {SAMPLE} cannot be trained on "
                        f"({refused['reason']}). {refused['detail']}"
                    )

    def _to_render(self) -> Iterator[tuple[str, list[tuple[str, CountRequest]]]]:
        """(model name, [(field of a file, how the model reads it)]) of each model that reads a file."""
        spec = self.spec
        if not isinstance(spec, JobSpec):
            need = Kind.PREFERENCE if isinstance(spec, EvaluationSpec) and spec.type == "preference" else Kind.PROMPTS
            for side, model in self._written_by(spec):
                with self.services.database.read() as session:
                    rendering = RENDERINGS[self.kind.name](spec, self.job.project, side, model, session)
                recipe = self._recipe(spec, "data", need) | {"rendering": rendering}
                yield model, [("data", CountRequest(self._path(spec.data), recipe, self.outlines["data"].kept, SAMPLE))]
            return
        files, requests = dict(spec.files()), []
        for stage in spec.stages():
            field, settings = stage.file_field, stage.settings
            recipe = self._recipe(spec, field, settings.data) | {
                "truncation": settings.truncation,
                "max_length": settings.max_length or DEFAULT_MAX_LENGTH,
                "loss_on": settings.scored,
                "pairs": vars(settings.pair_rule),
            }
            for name in (*spec.training_fields(field), field.replace("training", "validation")):
                if name in files:
                    rows = self.outlines[name].kept
                    requests.append((name, CountRequest(self._path(files[name]), recipe, rows, SAMPLE)))
        yield spec.model, requests

    @staticmethod
    def _written_by(spec: EvaluationSpec | LabellingSpec) -> list[tuple[str, str]]:
        """(side, model name) of each model that reads the data to answer it or to score its answers."""
        if isinstance(spec, LabellingSpec):
            named = [(f"writers.{number}", writer.model) for number, writer in enumerate(spec.writers)]
        else:
            sides = (("candidate", spec.candidate), ("baseline", spec.baseline))
            named = [(name, side.model) for name, side in sides if side is not None]
        return [(side, model) for side, model in named if model is not None]

    @staticmethod
    def _recipe(spec: AnySpec, field: str, need: Kind) -> JsonObject:
        mapping = spec.reads(field)
        return {
            "need": need.value,
            "max_length": DEFAULT_MAX_LENGTH,
            "loss_on": "answers",
            "mapping": None if mapping is None else mapping.model_dump(mode="json"),
            "rendering": vars(spec.rendering),
        }

    def _fail(self, invalid: _Invalid) -> None:
        code = invalid.code or self.kind.file_code(invalid.field)
        error = {"code": code, "message": invalid.reason, "param": invalid.param}
        self.lease.write(
            lambda session: transitions.transition(
                session,
                self.job.id,
                Status.VALIDATING,
                Status.FAILED,
                actor=Actor.VALIDATOR,
                attempt=self.job.attempt,
                message=f"{invalid.field} cannot be {self.kind.used}. {invalid.reason}",
                level="error",
                error=error,
            )
        )
