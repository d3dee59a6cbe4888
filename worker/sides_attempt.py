"""One attempt at a job whose models are sides: they answer prompts, score answers, or judge them.

Completions and paid answers are parts in the job's folder of the object store. Later attempts reuse them.
"""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from sqlalchemy.orm import Session

from app.files.tables import File
from app.jobs import events as job_events
from app.jobs.queue import JOBS
from app.jobs.states import Status
from app.jobs.tables import Job
from app.models import repository as models
from app.spec import quality_gates
from app.spec.evaluation import Endpoint, EvaluationSpec
from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec
from app.spec.quality_gates import Gate
from app.work_queue import PROGRESS
from worker.endpoints.asking import Asking
from worker.endpoints.client import EndpointFailed, Question, Role
from worker.lease import LeaseLost
from worker.runner import JobAttempt
from worker.trainer.events import CompletionsWritten, Event

SidesSpec = TypeVar("SidesSpec", EvaluationSpec, LabellingSpec)
ANSWERS = "answers"
"""The first word in the names of parts that hold answers of endpoints. All other parts hold completions."""


class SidesAttempt(JobAttempt[SidesSpec], Generic[SidesSpec]):
    """One attempt at an evaluation or at a labelling."""

    SPEC_FILE: ClassVar[str]
    """The file of the spec in the trainer's folder."""
    JUDGES: ClassVar[str]
    """The beginning of the names of parts with completions by models that judge. They are counted separately."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asking = dict[str, Asking]()
        """The asking of each endpoint, by the beginning of the names of its parts."""

    @property
    def parts_prefix(self) -> str:
        """The prefix of completions and answers that later attempts reuse. Format 2 counts rows as their file does."""
        return f"jobs/{self.job.id}/parts-2"

    def timeout_hint(self) -> str:
        return "Its completions are lost. Ask for fewer, or set a longer timeout."

    @abstractmethod
    def rendering(self, session: Session, side: str, name: str) -> JsonObject:
        """How the model `name` of a side renders conversations."""

    @abstractmethod
    def measured_by(self) -> str | None:
        """The name of the model whose training decides the precision of the base models; None without one."""

    @abstractmethod
    def endpoints(self) -> list[tuple[str, Endpoint, Role]]:
        """(beginning of the names of its parts, endpoint, role) of every endpoint that the job asks."""

    def fetch_parts(self) -> None:
        """Fetch the completions and answers of earlier attempts, and count the completions."""
        self.services.storage.get_folder(self.parts_prefix, self.folder / "parts")
        for name, endpoint, role in self.endpoints():  # whenever the job fails, their answers are kept
            self.asks(endpoint, name, role)
        self.completions = Counter[bool]()  # whether a judge made them → number
        for path in (self.folder / "parts").glob("*.jsonl"):
            if not path.name.startswith(ANSWERS):
                self.completions[self._by_judge(path)] += _line_count(path)

    def place(self, spec: SidesSpec, **about: object) -> None:
        """Put the files and models of `spec` into the trainer's folder, and the spec itself. Raises `CannotRun`.

        `about` are further entries of `run.json`.
        """
        places = {field: f"data/{file_id}" for field, file_id in spec.files()}
        for field, file_id in spec.files():
            self.fetch_file(file_id, self.folder / places[field], field)
        sides, precision = dict[str, JsonObject](), self.lease.read(self._precision)
        placed = list(places.values())
        for field, name in spec.models():
            side = field.removesuffix(".model")
            sides[side] = {"rendering": self.lease.read(partial(self.rendering, side=side, name=name))}
            stack, _ = self.fetch_model(name, self.folder / "sides" / side, field)
            placed += [f"sides/{side}/{part}" for part in stack.placed]
            sides[side] |= {
                "model": name,
                "base_model": stack.model.foundation or stack.model.base_model,
                "version": stack.version,
                "quantization": spec.quantization,
                **precision,
            }
        located = spec.sealed(lambda _: None).with_files(places)  # without keys, as the trainer asks no endpoint
        (self.folder / self.SPEC_FILE).write_text(located.model_dump_json())
        run = {
            "sides": sides,
            "attempt": self.job.attempt,
            "placed": placed,
            "log": {"job": self.job.id, "attempt": self.job.attempt, "request": self.job.request_id},
            "bases": self.bases,
            **about,
            **self.health.placement(self.devices),
        }
        (self.folder / "run.json").write_text(json.dumps(run))

    def _precision(self, session: Session) -> JsonObject:
        """The precision of the training of `measured_by`; empty if this job quantises in another way."""
        name = self.measured_by()
        training = models.job_of(session, self.job.project, name) if name else None
        if training is None or training.spec["quantization"] != self.spec.quantization:
            return {}
        return {name: training.spec.get(name) for name in ("double_quantization", "compute_dtype")}

    def asks(self, endpoint: Endpoint, name: str, role: Role) -> Asking:
        """The asking of `endpoint`, with the answers of earlier attempts. `name` begins the names of its parts."""
        if name not in self.asking:
            self.asking[name] = Asking(self, endpoint, name, role)
        return self.asking[name]

    def ask(self, asking: Asking, questions: Callable[[], Iterator[Question]], field: str) -> bool:
        """Let an endpoint, which `field` names, answer all `questions`. False if it does not: the job has failed."""
        try:
            asking.ask(questions, self.report_answers)
        except EndpointFailed as failed:
            return self.fail(failed.code, str(failed), failed.param(field))
        return True

    def report_answers(self, answers: int, questions: int) -> None:
        """Show that so many of the questions to an endpoint are answered."""
        sampled = self.completions[False]
        self.write_columns(
            **PROGRESS, progress={"completions": sampled, "total": sampled, "answers": answers, "questions": questions}
        )

    def before_write(self, event: Event) -> None:
        if isinstance(event, CompletionsWritten):
            path = self.folder / event.path
            self.lease.outlast(partial(self.services.storage.put_file, f"{self.parts_prefix}/{path.name}", path))
            self.completions[self._by_judge(path)] += event.completions

    def columns(self, batch: list[Event]) -> dict[str, object]:
        columns: dict[str, object] = {"lost_attempts": Job.lost_attempts}
        for event in batch:
            if isinstance(event, CompletionsWritten):
                progress = {"completions": self.completions[self._by_judge(Path(event.path))], "total": event.total}
                columns = {**PROGRESS, "progress": progress}
        return columns

    def write_event(self, session: Session, event_id: str, event: Event) -> None:
        """Write nothing. The job's progress shows the parts."""

    def write_columns(self, **columns: object) -> None:
        """Write columns of the job's row. Raises `LeaseLost`."""

        def write(session: Session) -> None:
            if not JOBS.write(session, self.job.id, self.job.attempt, **columns):
                raise LeaseLost

        self.lease.write(write)

    def finish(
        self, message: str, metrics: dict[str, float], gates: Sequence[Gate], stored: Sequence[Callable[[], File]]
    ) -> None:
        """End the job as succeeded, with its `metrics`, its gates and its files. `stored` make the files' rows."""
        verdicts = quality_gates.judge(gates, metrics)

        def write(session: Session) -> None:
            if verdicts:
                if not JOBS.write(session, self.job.id, self.job.attempt, gates=verdicts):
                    raise LeaseLost
                job_events.add(
                    session, self.job.id, quality_gates.summary(verdicts), level=quality_gates.level(verdicts)
                )
            results = [make_row() for make_row in stored]
            self.end(
                session,
                Status.SUCCEEDED,
                message,
                result_files=[file.id for file in results],
                metrics=metrics,
                gates=verdicts or None,
            )
            session.add_all(results)

        self.lease.write(write)

    def fail(self, code: str, message: str, param: str | None) -> bool:
        """Fail the job, and keep the new answers of endpoints for later jobs."""
        for asking in self.asking.values():
            asking.leave()
        return super().fail(code, message, param)

    def _by_judge(self, part: Path) -> bool:
        """Whether a part holds completions of a model that judges."""
        return part.name.startswith(self.JUDGES)


def read_items(path: Path) -> Iterator[JsonObject]:
    """The items in `path`, one by one."""
    with path.open() as file:
        yield from map(json.loads, file)


def change_items(path: Path, change: Callable[[JsonObject], JsonObject]) -> None:
    """Replace each item in `path` by what `change` makes of it."""
    changed = path.with_suffix(".changed")
    with changed.open("w") as file:
        file.writelines(json.dumps(change(item), ensure_ascii=False) + "\n" for item in read_items(path))
    changed.replace(path)


def _line_count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
