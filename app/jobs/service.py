"""The HTTP operations on trainings."""

from typing import cast

from sqlalchemy.orm import Session

from app.broker import Broker, Lane
from app.database import Database
from app.errors import ServiceError, no_such
from app.estimates import fit
from app.evaluations.service import PURPOSES, Evaluations
from app.files import repository as files
from app.files.tables import File
from app.idempotency.service import RequestIdentity
from app.jobs import checkpoints as job_checkpoints
from app.jobs import events as job_events
from app.jobs.downsample import downsample
from app.jobs.event_feed import Feed
from app.jobs.kinds import TRAINING_JOB
from app.jobs.lifecycle import Lifecycle
from app.jobs.queue_forecast import QueuePlace
from app.jobs.schemas import CheckpointObject, JobObject, MetricSeries, Point
from app.jobs.tables import Job
from app.keys.service import Keys
from app.models import repository as models
from app.spec.datasets.mapping import Mapping
from app.spec.job import JobSpec
from app.spec.prequantized import TRAINABLE, refusal
from app.storage import Storage
from app.workers import repository as workers


class Jobs(Lifecycle[JobObject]):
    """Create, find, follow and cancel trainings."""

    KIND = TRAINING_JOB

    def __init__(
        self,
        database: Database,
        storage: Storage,
        broker: Broker,
        keys: Keys,
        feed: Feed,
        evaluations: Evaluations,
    ) -> None:
        super().__init__(database, storage, broker, keys, feed)
        self.evaluations = evaluations

    def show(self, job: Job, place: QueuePlace | None = None) -> JobObject:
        return JobObject.of(job, place)

    def create(self, project: str, spec: JobSpec, identity: RequestIdentity) -> JobObject:
        """Check the models and files that the spec names, store the job, and wake a CPU worker to check its files."""
        self.evaluations.require_reachable(spec.evaluations or [], "evaluations.")
        return self._create(
            project, spec, identity, lambda session: self.add(session, project, spec, identity.request_id)
        )

    def prepare(
        self, session: Session, project: str, spec: JobSpec
    ) -> tuple[models.ResolvedModel, models.ResolvedModel | None, JobSpec]:
        """Returns (the start model, the reference model if the spec names one, the spec as it would run).

        Raises `ServiceError` if the job cannot run.
        """
        model = self._start_model(session, project, spec)
        reference = self._reference_model(session, project, spec)
        self._require_reward_models(session, project, spec)
        fit.require_devices(session, spec.resources, model.base_model)
        spec = self._with_mappings(spec, self._files(session, project, spec))
        self._check_integrations(session, spec)
        spec = self._on_prequantized(session, model, spec)
        if model.adapter:
            spec = spec.model_copy(update={"adapter": model.adapter})
        parent = models.job_of(session, project, spec.model)
        if parent is not None:  # render text as the start model was trained on it
            spec = spec.inheriting(parent.spec)
        return model, reference, spec.resolved()

    def add(
        self, session: Session, project: str, spec: JobSpec, request_id: str | None, sweep_id: str | None = None
    ) -> Job:
        """Check the models and files that `spec` names and store the job. Raises `ServiceError`.

        `sweep_id` is the sweep that the job belongs to, if any.
        """
        model, reference, resolved = self.prepare(session, project, spec)
        shape = fit.shape_of(session, project, resolved, model.base_model)
        devices = fit.devices_of(session, model.base_model, resolved.resources.nodes)
        if shape is not None:
            refused = fit.refusal(fit.placed(resolved, shape, devices, None), shape, devices, None)
            if refused is not None:
                param, message = refused
                raise ServiceError(message, param=param, code=fit.CODE)
        job = self._add(
            session,
            project,
            spec,
            request_id,
            [reference.base_model] if reference is not None else [],
            model=spec.model,
            base_model=model.base_model,
            foundation=model.foundation,
            training_file=spec.training_file,
            validation_file=spec.validation_file,
            spec=resolved.without_keys().to_store(),
            sweep_id=sweep_id,
            least_devices=resolved.resources.least,
            most_devices=resolved.resources.most,
            nodes=resolved.resources.nodes,
        )
        if spec.evaluations:
            if spec.trains_rewards:
                message = "A reward model is not evaluated: it judges others, as the 'judge' of an evaluation."
                raise ServiceError(message, param="evaluations", code="invalid_value")
            attached = (
                self.evaluations.attach(session, job, number, evaluation)
                for number, evaluation in enumerate(spec.evaluations)
            )
            job.evaluations = {
                evaluation.name: evaluation_job.id
                for evaluation, evaluation_job in zip(spec.evaluations, attached, strict=True)
            }
        return job

    @staticmethod
    def _start_model(session: Session, project: str, spec: JobSpec) -> models.ResolvedModel:
        model = models.require(session, project, spec.model, "model", lock=True)
        if model.kind == "reward":
            message = f"'{spec.model}' is a reward model, which cannot be trained further."
            raise ServiceError(message, param="model", code="invalid_value")
        if model.kind == "adapter" and spec.adapter is not None:
            message = f"'{spec.model}' has an adapter, and training goes on with it; leave 'adapter' out."
            raise ServiceError(message, param="adapter", code="invalid_value")
        return model

    @staticmethod
    def _on_prequantized(session: Session, model: models.ResolvedModel, spec: JobSpec) -> JobSpec:
        """Take over the quantisation of a base that is quantised already. Raises `ServiceError` if it does not fit."""
        method = models.prequantized(session, model.base_model)
        if method is None:
            return spec
        if spec.quantization is None and method in TRAINABLE:
            spec = spec.model_copy(update={"quantization": TRAINABLE[method]})
        decided = {
            "double_quantization": spec.double_quantization is not None,
            "compute_dtype": spec.compute_dtype == "fp8",
        }
        for field, is_set in decided.items():
            if is_set:
                message = f"'{model.base_model}' is quantised already ({method}), which decides this: leave it out."
                raise ServiceError(message, param=field, code="unsupported_model")
        resolved = spec.resolved()
        refused = refusal(
            model.base_model, method, quantization=resolved.quantization or "none", full=resolved.adapter == "none",
            rewards=spec.trains_rewards,
        )  # fmt: skip
        if refused is not None:
            param, message = refused
            raise ServiceError(message, param=param, code="unsupported_model")
        return spec

    @staticmethod
    def _files(session: Session, project: str, spec: JobSpec) -> dict[str, File]:
        """The files of the spec by field, locked: nobody can delete them until this transaction ends."""
        return {
            field: files.require(session, project, file_id, field, ["fine-tune"] if spec.needs(field) else PURPOSES)
            for field, file_id in spec.files()
        }

    @staticmethod
    def _with_mappings(spec: JobSpec, files_by_field: dict[str, File]) -> JobSpec:
        """The spec with the mappings that its files were uploaded with. A mapping in the spec itself wins."""
        for prefix, stage in (("", spec), ("sft.", spec.sft)):
            mappings = {
                field: file.mapping
                for field, file in files_by_field.items()
                if field.startswith("sft.") == bool(prefix) and spec.needs(field) is not None
            }
            if stage is None or stage.mapping is not None or not any(mappings.values()):
                continue
            training, *others = mappings.values()
            if any(mapping != training for mapping in others):
                message = "The files were uploaded with different mappings; give the one that reads both as 'mapping'."
                raise ServiceError(message, param=f"{prefix}mapping", code="invalid_value")
            mapped = stage.model_copy(update={"mapping": Mapping.model_validate(training)})
            spec = spec.model_copy(update={"sft": mapped}) if prefix else cast(JobSpec, mapped)
        return spec

    @staticmethod
    def _check_integrations(session: Session, spec: JobSpec) -> None:
        for number, integration in enumerate(spec.integrations or []):
            present = workers.present(session, Lane.GPU)
            if not any(integration.type in worker.details.get("integrations", []) for worker in present):
                message = "No worker has a key for Weights & Biases. The operator of a worker can set WANDB_API_KEY."
                raise ServiceError(message, param=f"integrations.{number}.type", code="integration_not_configured")

    @staticmethod
    def _reference_model(session: Session, project: str, spec: JobSpec) -> models.ResolvedModel | None:
        """The reference model that the spec names; None if the reference is the model that the policy starts from."""
        if spec.reference_model is None:
            return None
        param = "method.dpo.hyperparameters.reference_model"
        reference = models.require(session, project, spec.reference_model, param, lock=True)
        if reference.kind == "reward":
            message = f"'{spec.reference_model}' is a reward model, which has no log-probs."
            raise ServiceError(message, param=param, code="invalid_value")
        method = models.prequantized(session, reference.base_model)
        if method is not None and method not in TRAINABLE:
            message = f"'{reference.base_model}' is quantised by {method}, which this service cannot read."
            raise ServiceError(message, param=param, code="unsupported_model")
        return reference

    @staticmethod
    def _require_reward_models(session: Session, project: str, spec: JobSpec) -> None:
        """Refuse a grader whose model is no reward model."""
        for field, name in spec.grader_models:
            model = models.require(session, project, name, field, lock=True)
            # A checkpoint of a reward training is not the classifier that the training ends with.
            if model.kind != "reward" or models.get(session, project, name) is None:
                message = f"'{name}' is not a reward model that a training has ended with."
                raise ServiceError(message, param=field, code="invalid_value")

    def metrics(self, project: str, job_id: str, names: list[str] | None, points: int) -> MetricSeries:
        """The series of each metric, or only those of `names`, with at most `points` points each.

        A resumed job measures the steps since its checkpoint again. The last measurement of a step counts.
        """
        with self.database.read() as session:
            self._require_job(session, project, job_id)
            measurements = job_events.metrics(session, job_id)
        series: dict[str, dict[int, float]] = {}
        stages: dict[str, int] = {}
        for data in measurements:
            stages.setdefault(data["stage"], data["step"])
            for name, value in data.items():
                if isinstance(value, float) and name != "train_loss" and (names is None or name in names):
                    series.setdefault(name, {})[data["step"]] = value
        return MetricSeries(
            job_id=job_id,
            stages=stages,
            series={
                name: [Point(step=step, value=value) for step, value in downsample(sorted(by_step.items()), points)]
                for name, by_step in sorted(series.items())
            },
        )

    def checkpoints(self, project: str, job_id: str, *, after: str | None, limit: int) -> list[CheckpointObject]:
        """Up to `limit` + 1 checkpoints, latest step first."""
        with self.database.read() as session:
            self._require_job(session, project, job_id)
            checkpoints = job_checkpoints.page(session, job_id, after=after, limit=limit)
        if checkpoints is None:
            raise no_such("checkpoint of this job", after or "", code="checkpoint", param="after")
        return [CheckpointObject.of(checkpoint) for checkpoint in checkpoints]
