"""What can be done with evaluations over HTTP."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import structlog
from sqlalchemy.orm import Session

from app.archive import Entry, tar
from app.broker import Broker, Lane
from app.database import Database
from app.encryption import Vault
from app.errors import NotFound, ServiceError
from app.evaluations.schemas import EvaluationObject
from app.files import repository as files
from app.files.tables import File
from app.idempotency.service import Sending
from app.jobs import checkpoints as job_checkpoints
from app.jobs import queries
from app.jobs.event_feed import Feed
from app.jobs.kinds import EVALUATION
from app.jobs.lifecycle import Lifecycle
from app.jobs.queue_forecast import QueuePlace
from app.jobs.states import ACTIVE
from app.jobs.tables import Job
from app.keys.service import Keys
from app.models import repository as models
from app.outbound_http import HostRefused, find
from app.spec.datasets.mapping import Mapping
from app.spec.evaluation import TAKES, EvaluationSpec, JobEvaluation, Side
from app.storage import Storage

log = structlog.get_logger(__name__)

PURPOSES = ("evals", "fine-tune")
BETA = 0.1
PRIVATE = "DPO_PRIVATE_JUDGES"


class Evaluations(Lifecycle[EvaluationObject]):
    """Create, find, follow and cancel evaluations, and read what they found."""

    KIND = EVALUATION

    def __init__(
        self,
        database: Database,
        storage: Storage,
        broker: Broker,
        keys: Keys,
        feed: Feed,
        vault: Vault,
        private_hosts: tuple[str, ...],
    ) -> None:
        super().__init__(database, storage, broker, keys, feed)
        self.vault, self.private_hosts = vault, private_hosts

    def show(self, job: Job, place: QueuePlace | None = None) -> EvaluationObject:
        return EvaluationObject.of(job, place)

    def create(self, project: str, spec: EvaluationSpec, sending: Sending) -> EvaluationObject:
        """Check what the spec names, store the evaluation, then wake a worker of the CPU lane to check its files."""
        content = spec.to_store()
        self.reachable([spec])
        with self.database.write() as session:
            earlier = sending.earlier(session, "evaluations.create", content)
            job = None if earlier is None else queries.get(session, project, earlier, EVALUATION)
            if job is None:
                job = self._insert(session, project, spec, sending.request_id)
                sending.made(session, "evaluations.create", content, job.id)
        log.info("evaluation accepted", job=job.id, project=project, request=sending.request_id)
        self.broker.wake(Lane.CPU)
        return self.show(job) if earlier is None else self.get(project, job.id)

    def reachable(self, specs: Iterable[EvaluationSpec], param: str = "") -> None:
        """Refuse judges that nothing may be sent to. Names are looked up: not while a transaction waits."""
        endpoints = [spec.judge.endpoint for spec in specs if spec.judge is not None]
        for url in dict.fromkeys(endpoint.base_url for endpoint in endpoints if endpoint is not None):
            try:
                find(url, self.private_hosts, PRIVATE)
            except HostRefused as refused:
                message = f"The judge at {url} cannot be asked: {refused}."
                raise ServiceError(message, param=f"{param}judge.endpoint.base_url", code="invalid_url") from None

    def attach(self, session: Session, job: Job, number: int, asked: JobEvaluation) -> Job:
        """Store an evaluation of the model that the training `job` makes. It waits until that is there."""
        try:
            return self._insert(session, job.project, asked.of(job.makes), job.request_id, of=job)
        except ServiceError as error:
            error.param = f"evaluations.{number}.{error.param}"
            raise

    def _insert(
        self, session: Session, project: str, spec: EvaluationSpec, request_id: str | None, *, of: Job | None = None
    ) -> Job:
        """Store an evaluation; `of` is the training that makes its candidate, which is not there yet."""
        scores = spec.judge is not None and not spec.judge.asked
        found = {
            field: self._model(session, project, field, name, scores=scores)
            for field, name in spec.models() if of is None or field != "candidate.model"
        }  # fmt: skip
        for field, file_id in spec.files():
            file = files.require(session, project, file_id, field, PURPOSES)
            if file.mapping is not None:
                spec = spec.reading(field, Mapping.model_validate(file.mapping))
        resolved = self._resolved(session, project, spec, of)
        if resolved.baseline != spec.baseline:
            found |= {
                field: self._model(session, project, field, name, scores=scores)
                for field, name in resolved.models() if field == "baseline.model"
            }  # fmt: skip
        first = next(iter(found.values()), None)
        if of is not None:
            first = models.ResolvedModel(of.makes, "adapter", of.base_model, None, None, None, of.foundation)
        # A reward model is whole, its base model in it.
        bases = [one.base_model for one in (first, *found.values()) if one is not None and one.kind != "reward"]
        return self._add(
            session,
            project,
            spec,
            request_id,
            bases,
            model=first.name if first else "",
            base_model=bases[0] if bases else "",
            foundation=first.foundation if first else None,
            training_file=spec.data,
            validation_file=None,
            spec=resolved.sealed(self.vault.seal).to_store(),
            parent_id=of.id if of else None,
            sweep_id=of.sweep_id if of else None,
        )

    @staticmethod
    def _model(session: Session, project: str, field: str, name: str, *, scores: bool) -> models.ResolvedModel:
        """A model that an evaluation loads; it cannot be deleted until this transaction ends."""
        model = models.require(session, project, name, field, lock=True)
        judges = field.endswith("best_of.by.model") or (field == "judge.model" and scores)
        # A checkpoint of a reward model is not the classifier that its training ends with.
        if (model.kind == "reward") != judges or (judges and models.get(session, project, name) is None):
            wants = "a reward model that a training has ended with" if judges else "a language model"
            raise ServiceError(f"'{name}' is not {wants}.", param=field, code="invalid_value")
        return model

    @staticmethod
    def _resolved(session: Session, project: str, spec: EvaluationSpec, made: Job | None) -> EvaluationSpec:
        """The spec with what the candidate's training says, `made` or the one that is found, where it is silent."""
        name = spec.candidate.model if spec.candidate is not None else None
        if made is None and name is not None:
            made = models.job_of(session, project, name)
        training: dict[str, Any] = made.spec if made is not None else {}
        settings = ((training.get("method") or {}).get("dpo") or {}).get("hyperparameters") or {}
        changes: dict[str, Any] = {"quantization": spec.quantization or training.get("quantization", "none")}
        bounded = spec.type == "reward_kl" and spec.candidate is not None and spec.candidate.best_of is not None
        missing = spec.baseline is None and not bounded  # best of N is held to the model that it samples
        if "baseline" in TAKES[spec.type] and (missing or (spec.baseline and spec.baseline.reference)):
            if made is None:
                message = f"'{name}' was not trained here: name what it is compared with."
                raise ServiceError(message, param="baseline", code="missing_required_parameter")
            in_sft = name is not None and job_checkpoints.stage_of(session, name) == "sft"
            if in_sft:  # what SFT leaves is held to nothing: it is compared with what it began from
                changes["baseline"] = _named(spec.baseline, made.model)
            elif training.get("sft") is None or settings.get("reference_model"):
                changes["baseline"] = _named(spec.baseline, settings.get("reference_model") or made.model)
            else:  # what the SFT stage left, which has a name once it is there
                left = job_checkpoints.left_by(session, made.id, "sft")
                changes["baseline"] = _named(spec.baseline, left.model_name if left is not None else None)
                if left is None and made.status not in ACTIVE:
                    message = f"What the SFT stage of '{name}' left was not kept: name what it is compared with."
                    raise ServiceError(message, param="baseline", code="missing_required_parameter")
        if spec.type == "preference" and spec.beta is None:
            changes["beta"] = settings.get("beta") or BETA
        return spec.model_copy(update=changes).inheriting(training).resolved()

    def report(self, project: str, evaluation_id: str) -> Iterator[bytes]:
        """The report, as JSON. Raises `NotFound` before there is one."""
        job, made = self._results(project, evaluation_id)
        if made[0].id != job.result_files[0]:
            message = f"The report of evaluation {evaluation_id} was deleted."
            raise NotFound(message, code="report_not_found")
        return self.storage.chunks(made[0].key)

    def download(self, project: str, evaluation_id: str) -> Iterator[bytes]:
        """The evaluation, its report and its items, as a tar stream. Raises `NotFound` before there are any."""
        job, made = self._results(project, evaluation_id)
        itself = self.show(job).model_dump_json(indent=1).encode()
        content: Iterator[Entry] = ((file.filename, file.bytes, self.storage.chunks(file.key)) for file in made)
        return tar(chain([("evaluation.json", len(itself), [itself])], content))

    def _results(self, project: str, evaluation_id: str) -> tuple[Job, list[File]]:
        """An evaluation and those of its result files that were not deleted, the report first."""
        with self.database.read() as session:
            job = self._found(session, project, evaluation_id)
            made = [file for one in job.result_files if (file := files.get(session, project, one)) is not None]
        if not made:
            message = f"Evaluation {evaluation_id} has no results: it is {job.status}."
            if job.result_files:
                message = f"The results of evaluation {evaluation_id} were deleted."
            raise NotFound(message, code="report_not_found")
        return job, made


def _named(side: Side | None, model: str | None) -> Side:
    """A side that stands for the reference, by the name of the model; None where it has no name yet."""
    known = {"model": model} if model is not None else {"reference": True}
    return Side.model_validate({"best_of": side.best_of if side is not None else None, **known})
