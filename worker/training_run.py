"""One attempt at a training: its input, its checkpoints, its metrics and the resulting model."""

import json
import math
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from app.database import database_now, new_id
from app.jobs import checkpoints as job_checkpoints
from app.jobs import events as job_events
from app.jobs import transitions
from app.jobs.queue import JOBS
from app.jobs.states import Status
from app.jobs.tables import Checkpoint, Job
from app.models import repository as models
from app.models.tables import Model
from app.spec import quality_gates
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.metrics import SUMMARY
from app.stored_content import FolderContent, store_folder
from app.work_queue import PROGRESS
from worker.checkpoints import Checkpoints
from worker.integrations import Reporter
from worker.lease import LeaseLost
from worker.runner import Done, JobAttempt
from worker.trainer.events import CheckpointWritten, Event, Metrics, StageBegan, TrainingDone, Working

FINISH_SECONDS = 30.0
"""Time to send the last metrics of an attempt to its integrations. A worker that stops does not take it."""
MEASURED_STEPS = 20_000
"""In a training of more steps than this, only every nth step has an event with its metrics."""


def is_recorded(event: Metrics) -> bool:
    """Whether the metrics of a step become an event. Those of a validation and of the last step always do."""
    stride = math.ceil(event.total_steps / MEASURED_STEPS) or 1
    has_validation = any(name.startswith("eval/") for name in event.metrics)
    return event.step % stride == 0 or event.step == event.total_steps or has_validation


class Training(JobAttempt[JobSpec]):
    """One attempt at a training."""

    reporter: Reporter | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stage, self.metrics = self.job.stage or self.spec.stages()[0].name, dict(self.job.metrics or {})
        """The stage, and the last value of each of its metrics. Validations are rare, so their values stay."""
        before_the_first_step = {"step": 0, "total_steps": 0, "seconds_remaining": None, "tokens_per_second": None}
        self.progress: JsonObject = self.job.progress or before_the_first_step

    def timeout_hint(self) -> str:
        last = self.lease.read(lambda session: job_checkpoints.last(session, self.job.id))
        if last is None:
            return "It has made no checkpoint. Set a longer timeout, or a smaller 'checkpoint_every'."
        return f"Its checkpoints are kept. A new job can start from the last: {last.model_name}"

    @staticmethod
    def read_spec(job: Job) -> JobSpec:
        return JobSpec.stored(job.spec)

    def close(self) -> None:
        if self.reporter is not None:
            self.reporter.close(1.0 if self.stopping.is_set() else FINISH_SECONDS)

    def prepare(self) -> None:
        self.checkpoints = Checkpoints(self.services.storage, self.lease, self.job)
        self.stored = dict[str, tuple[FolderContent, int]]()
        """The content of the models of this attempt's checkpoints, by their path in the work folder."""
        self.reporter = Reporter(self.job.id, self.spec, self.folder)
        self._relay([Working("fetching", None, None)])
        spec = self.spec
        files = dict(spec.files())
        places = {field: f"data/{file_id}" for field, file_id in files.items()}
        for field, file_id in files.items():
            self.fetch_file(file_id, self.folder / places[field], field)
        stack, revision = self.fetch_model(spec.model, self.folder, "model")
        placed = [*stack.placed, *places.values()]
        if spec.reference_model is not None:
            field = "method.dpo.hyperparameters.reference_model"
            reference, _ = self.fetch_model(spec.reference_model, self.folder / "reference", field)
            placed += [f"reference/{name}" for name in reference.placed]
        renderings = list[JsonObject]()
        for number, (field, name) in enumerate(spec.grader_models):
            grader, _ = self.fetch_model(name, self.folder / "graders" / str(number), field)
            placed += [f"graders/{number}/{part}" for part in grader.placed]
            renderings.append(self.lease.read(partial(self._rendering, name)))
        if self.checkpoints.fetch(self.folder / "resume"):
            placed.append("resume")
        (self.folder / "spec.json").write_text(spec.with_files(places).model_dump_json())
        run = {
            "base_model": self.job.foundation or self.job.base_model,
            "revision": revision,
            "version": stack.version,
            "spec": self.job.spec,
            "bases": self.bases,
            "renderings": renderings,
            **self.health.placement(self.devices),
            "placed": placed,
            "log": {"job": self.job.id, "attempt": self.job.attempt, "request": self.job.request_id},
        }
        (self.folder / "run.json").write_text(json.dumps(run))

    def _rendering(self, name: str, session: Session) -> JsonObject:
        """How the reward model `name` renders conversations: as in its training."""
        training = models.job_of(session, self.job.project, name)
        return vars(self.spec.rendering if training is None else JobSpec.stored(training.spec).rendering)

    def before_write(self, event: Event) -> None:
        match event:
            case CheckpointWritten():
                stored = self.checkpoints.store(f"{self.prefix}/{event.path}", self.folder / event.path)
                self.stored[event.path] = stored
            case Metrics() if self.reporter is not None:
                self.reporter.metrics(event.step, event.metrics)

    def columns(self, batch: list[Event]) -> dict[str, object]:
        columns = dict[str, object]()
        for event in batch:
            match event:
                case Working():
                    activity = {"name": event.activity, "done": event.done, "total": event.total}
                    columns["progress"] = self.progress | {"activity": activity}
                    columns["stage"] = self.stage
                case StageBegan():
                    if event.stage != self.stage:
                        self.stage, self.metrics = event.stage, {}
                    columns["stage"] = event.stage
                case Metrics():
                    self.progress = {
                        "step": event.step,
                        "total_steps": event.total_steps,
                        "seconds_remaining": event.seconds_remaining,
                        "tokens_per_second": event.metrics.get("tokens_per_second"),
                    }
                    columns["progress"] = self.progress
                    self.metrics |= event.metrics
                    columns["metrics"] = dict(self.metrics)
                    columns["stage"] = event.stage
                case CheckpointWritten():
                    columns |= PROGRESS
        return columns or {"lost_attempts": Job.lost_attempts}

    def write_event(self, session: Session, event_id: str, event: Event) -> None:
        match event:
            case StageBegan():
                text = f"Stage {event.stage}: {event.rows} rows, {event.validation_rows} for validation."
                job_events.add(session, self.job.id, text, id=event_id)
            case Metrics() if is_recorded(event):
                data = {"step": event.step, "stage": event.stage, "total_steps": event.total_steps}
                data |= event.metrics | {"train_loss": event.metrics.get("loss")}
                values = ", ".join(f"{name}={event.metrics[name]:.4f}" for name in SUMMARY if name in event.metrics)
                message = f"Step {event.step}/{event.total_steps}: {values}"
                job_events.add(session, self.job.id, message, type="metrics", data=data, id=event_id)
            case CheckpointWritten():
                self._write_checkpoint(session, event_id, event)

    def _write_checkpoint(self, session: Session, event_id: str, event: CheckpointWritten) -> None:
        name, prefix = f"{self.job.makes}:ckpt-step-{event.step}", f"{self.prefix}/{event.path}"
        content, state_bytes = self.stored[event.path]
        if job_checkpoints.move(session, self.job.id, event.step, prefix, content, state_bytes):
            return  # written again after a resume; the first copy may be incomplete
        session.add(
            Checkpoint(
                id=new_id("ftckpt"),
                job_id=self.job.id,
                project=self.job.project,
                created_at=database_now(),
                stage=event.stage,
                step_number=event.step,
                model_name=name,
                metrics=_checkpoint_metrics(event.step, event.metrics),
                prefix=prefix,
                content_of=prefix,
                state_bytes=state_bytes,
                **content.as_columns(),
            )
        )
        text = f"Checkpoint created at step {event.step}: {name}"
        job_events.add(session, self.job.id, text, id=event_id)

    def after_write(self, batch: list[Event]) -> None:
        if any(isinstance(event, CheckpointWritten) for event in batch):
            try:
                self.checkpoints.trim()
            except LeaseLost:
                raise
            except Exception as error:  # the training must not wait for it
                self.log.warning("checkpoints not trimmed", reason=str(error))

    def succeed(self, outcome: Done) -> None:
        assert isinstance(outcome, TrainingDone)
        name = self.job.makes
        folder = self.folder / "output"
        content = self.store(partial(store_folder, self.services.storage, f"{self.prefix}/model", folder))
        result_file = self.store_result(self.folder / "result.csv", "step_metrics.csv")

        def write(session: Session) -> None:
            # The job's row comes first. Its lock makes evaluations that end now wait, and events are numbered in the
            # order of their commits.
            if not JOBS.write(session, self.job.id, self.job.attempt, metrics=outcome.metrics):
                raise LeaseLost
            verdicts = transitions.judge_gates(session, self.job, outcome.metrics)
            if verdicts:
                job_events.add(
                    session, self.job.id, quality_gates.summary(verdicts), level=quality_gates.level(verdicts)
                )
            result = result_file()
            pace: dict[str, Any] = {"pace": outcome.pace} if outcome.pace else {}
            self.end(
                session,
                Status.SUCCEEDED,
                f"The job has succeeded. New fine-tuned model: {name}",
                gates=verdicts or None,
                fine_tuned_model=name,
                trained_tokens=outcome.trained_tokens,
                result_files=[result.id],
                metrics=outcome.metrics,
                **pace,
            )
            session.add(self._model(content))
            session.add(result)

        self.lease.write(write)

    def _model(self, content: FolderContent) -> Model:
        """The row of the resulting model, whose folder has this content."""
        job, adapter = self.job, self.job.spec["adapter"]
        return Model(
            name=job.makes,
            kind="reward" if self.spec.trains_rewards else "full" if adapter == "none" else "adapter",
            project=job.project,
            created_at=database_now(),
            base_model=job.base_model,
            job_id=job.id,
            prefix=f"{self.prefix}/model",
            **content.as_columns(),
            revision=None,
            details={"adapter": adapter, "quantization": job.spec["quantization"], "foundation": job.foundation},
        )


def _checkpoint_metrics(step: int, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics under the names of the OpenAI API and under our own."""
    names = {
        "train_loss": "loss",
        "train_mean_token_accuracy": "mean_token_accuracy",
        "valid_loss": "eval/loss",
        "valid_mean_token_accuracy": "eval/mean_token_accuracy",
    }
    renamed = {theirs: metrics[ours] for theirs, ours in names.items() if ours in metrics}
    return {"step": float(step), **renamed, **metrics}
