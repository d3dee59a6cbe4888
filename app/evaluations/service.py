"""The HTTP operations on evaluations."""

from collections.abc import Iterable

from sqlalchemy.orm import Session

from app.broker import Broker
from app.database import Database
from app.encryption import SecretBox
from app.errors import ServiceError
from app.estimates import fit
from app.evaluations.schemas import EvaluationObject
from app.files import repository as files
from app.idempotency.service import RequestIdentity
from app.jobs import checkpoints as job_checkpoints
from app.jobs.event_feed import Feed
from app.jobs.kinds import EVALUATION_JOB
from app.jobs.queue_forecast import QueuePlace
from app.jobs.result_files import ResultFiles
from app.jobs.sides import require_model, require_reachable
from app.jobs.states import ACTIVE
from app.jobs.tables import Job
from app.keys.service import Keys
from app.models import repository as models
from app.models.repository import ResolvedModel
from app.spec.datasets.mapping import Mapping
from app.spec.evaluation import ALLOWED_FIELDS, EvaluationSpec, JobEvaluation, Side
from app.spec.json_types import JsonObject
from app.storage import Storage

PURPOSES = ("evals", "fine-tune")
DEFAULT_BETA = 0.1
"""The beta of implicit rewards, if no training gives one."""


class Evaluations(ResultFiles[EvaluationObject]):
    """Create, find, follow and cancel evaluations, and read their results."""

    KIND = EVALUATION_JOB

    def __init__(
        self,
        database: Database,
        storage: Storage,
        broker: Broker,
        keys: Keys,
        feed: Feed,
        secret_box: SecretBox,
        private_hosts: tuple[str, ...],
    ) -> None:
        super().__init__(database, storage, broker, keys, feed)
        self.secret_box, self.private_hosts = secret_box, private_hosts

    def show(self, job: Job, place: QueuePlace | None = None) -> EvaluationObject:
        return EvaluationObject.of(job, place)

    def create(self, project: str, spec: EvaluationSpec, identity: RequestIdentity) -> EvaluationObject:
        """Check the models and files of the spec, store the evaluation, and wake a CPU worker to check the files."""
        self.require_reachable([spec])
        return self._create(
            project, spec, identity, lambda session: self.add(session, project, spec, identity.request_id)
        )

    def require_reachable(self, specs: Iterable[EvaluationSpec], param: str = "") -> None:
        """Raise `ServiceError` for a judge that no request may be sent to. To be called outside a transaction."""
        judges = [spec.judge for spec in specs if spec.judge is not None]
        field = f"{param}judge.endpoint"
        require_reachable([(field, judge.endpoint) for judge in judges if judge.endpoint], self.private_hosts)

    def attach(self, session: Session, job: Job, number: int, evaluation: JobEvaluation) -> Job:
        """Store an evaluation of the model that the training `job` makes. It waits until that model exists."""
        try:
            return self.add(session, job.project, evaluation.of(job.makes), job.request_id, training=job)
        except ServiceError as error:
            error.param = f"evaluations.{number}.{error.param}"
            raise

    def add(
        self,
        session: Session,
        project: str,
        spec: EvaluationSpec,
        request_id: str | None,
        *,
        training: Job | None = None,
    ) -> Job:
        """Store an evaluation. `training` is the job that will make its candidate, if that does not exist yet."""
        models_by_field = {
            field: self._require_model(session, project, spec, field, name)
            for field, name in spec.models() if training is None or field != "candidate.model"
        }  # fmt: skip
        for field, file_id in spec.files():
            file = files.require(session, project, file_id, field, PURPOSES)
            if file.mapping is not None:
                spec = spec.reading(field, Mapping.model_validate(file.mapping))
        resolved = self._resolved(session, project, spec, training)
        if resolved.baseline != spec.baseline:
            models_by_field |= {
                field: self._require_model(session, project, spec, field, name)
                for field, name in resolved.models() if field == "baseline.model"
            }  # fmt: skip
        main_model = next(iter(models_by_field.values()), None)
        if training is not None:
            main_model = models.ResolvedModel(
                training.makes, "adapter", training.base_model, None, None, None, training.foundation
            )
        # A reward model has whole weights: it needs no base model.
        used = (main_model, *models_by_field.values())
        bases = [model.base_model for model in used if model is not None and model.kind != "reward"]
        fit.require_devices(session, spec.resources, *bases)
        return self._add(
            session,
            project,
            spec,
            request_id,
            bases,
            model=main_model.name if main_model else "",
            base_model=bases[0] if bases else "",
            foundation=main_model.foundation if main_model else None,
            training_file=spec.data,
            validation_file=None,
            spec=resolved.sealed(self.secret_box.seal).to_store(),
            least_devices=spec.resources.least,
            most_devices=spec.resources.most,
            nodes=spec.resources.nodes,
            parent_id=training.id if training else None,
            sweep_id=training.sweep_id if training else None,
        )

    @staticmethod
    def _require_model(session: Session, project: str, spec: EvaluationSpec, field: str, name: str) -> ResolvedModel:
        """A model that an evaluation loads."""
        judges = field == "judge.model" and spec.judge is not None and not spec.judge.asked
        scores = judges or field.endswith("best_of.by.model")
        return require_model(session, project, field, name, scores=scores)

    @staticmethod
    def _resolved(session: Session, project: str, spec: EvaluationSpec, training: Job | None) -> EvaluationSpec:
        """Fill the gaps of the spec from `training`, or, if that is None, from the job that made its candidate."""
        name = spec.candidate.model if spec.candidate is not None else None
        if training is None and name is not None:
            training = models.job_of(session, project, name)
        training_spec: JsonObject = training.spec if training is not None else {}
        dpo_settings = ((training_spec.get("method") or {}).get("dpo") or {}).get("hyperparameters") or {}
        changes: dict[str, object] = {"quantization": spec.quantization or training_spec.get("quantization", "none")}
        # Best-of-N has a bound on its KL to the model that it samples. It takes no other baseline.
        bounded = spec.type == "reward_kl" and spec.candidate is not None and spec.candidate.best_of is not None
        missing = spec.baseline is None and not bounded
        if "baseline" in ALLOWED_FIELDS[spec.type] and (missing or (spec.baseline and spec.baseline.reference)):
            if training is None:
                message = f"'{name}' was not trained here: name a baseline to compare it with."
                raise ServiceError(message, param="baseline", code="missing_required_parameter")
            in_sft = name is not None and job_checkpoints.stage_of(session, name) == "sft"
            if in_sft:  # SFT has no reference: compare its checkpoint with the model that SFT started from
                changes["baseline"] = _reference_side(spec.baseline, training.model)
            elif training_spec.get("sft") is None or dpo_settings.get("reference_model"):
                reference = dpo_settings.get("reference_model") or training.model
                changes["baseline"] = _reference_side(spec.baseline, reference)
            else:  # the reference is the last checkpoint of the SFT stage, which has a name once it exists
                checkpoint = job_checkpoints.last_of_ended_stage(session, training.id, "sft")
                reference = checkpoint.model_name if checkpoint is not None else None
                changes["baseline"] = _reference_side(spec.baseline, reference)
                if checkpoint is None and training.status not in ACTIVE:
                    message = f"The SFT checkpoint of '{name}' was not kept: name a baseline to compare it with."
                    raise ServiceError(message, param="baseline", code="missing_required_parameter")
        if spec.type == "preference" and spec.beta is None:
            changes["beta"] = dpo_settings.get("beta") or DEFAULT_BETA
        return spec.model_copy(update=changes).inheriting(training_spec).resolved()


def _reference_side(side: Side | None, model: str | None) -> Side:
    """The side `side` with the reference, named `model`. None: the reference has no name yet and stays unnamed."""
    reference = {"model": model} if model is not None else {"reference": True}
    return Side.model_validate({"best_of": side.best_of if side is not None else None, **reference})
