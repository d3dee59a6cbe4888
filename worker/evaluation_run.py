"""One attempt at an evaluation: its models, its completions so far, its judge and its report."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

from sqlalchemy.orm import Session

from app import counted_objects
from app.jobs import checkpoints as job_checkpoints
from app.jobs import events as job_events
from app.jobs.queue import JOBS
from app.jobs.states import Status
from app.jobs.tables import Job
from app.models import repository as models
from app.spec import quality_gates
from app.spec.datasets.rendering import RenderingSettings
from app.spec.evaluation import EvaluationSpec, Judge
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.work_queue import PROGRESS
from worker.judges.endpoint import Answer, JudgeClient, JudgeFailed, key_of
from worker.judges.questions import questions, verdicts
from worker.lease import LeaseLost
from worker.runner import CannotRun, JobAttempt
from worker.trainer.events import CompletionsWritten, EvaluationDone, Event, TrainingDone

ANSWERS = "answers"
"""The first word in the names of parts that hold a judge's answers. All other parts hold completions."""


class Evaluation(JobAttempt[EvaluationSpec]):
    """One attempt at an evaluation."""

    @staticmethod
    def read_spec(job: Job) -> EvaluationSpec:
        return EvaluationSpec.stored(job.spec)

    @property
    def parts_prefix(self) -> str:
        """The prefix of completions and answers that later attempts reuse. Format 2 counts rows as their file does."""
        return f"jobs/{self.job.id}/parts-2"

    @property
    def answers_prefix(self) -> str:
        """The prefix of the answers that a judge gave to evaluations that failed.

        The answers were paid for. The next evaluation of the project that asks this judge the same question uses them.
        """
        judge = self.spec.judge
        assert judge is not None
        assert judge.endpoint is not None
        identity = judge.endpoint.model_dump(mode="json", include={"base_url", "model", "parameters"})
        digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"cache/judgements/{self.job.project}/{digest}"

    def timeout_hint(self) -> str:
        return "Its completions are lost. Ask for fewer, or set a longer timeout."

    def prepare(self) -> None:
        spec = self.spec
        self.services.storage.get_folder(self.parts_prefix, self.folder / "parts")
        self.answers = dict(_answers((self.folder / "parts").glob(f"{ANSWERS}-*.jsonl")))
        self.cached_keys = set[str]()
        places = {field: f"data/{file_id}" for field, file_id in spec.files()}
        for field, file_id in spec.files():
            self.fetch_file(file_id, self.folder / places[field], field)
        if spec.baseline is not None and spec.baseline.reference:
            reference = self.lease.read(self._reference)
            if reference is None:
                message = "The checkpoint of the SFT stage of the candidate's training does not exist any more."
                raise CannotRun("model_not_found", message, "baseline")
            baseline = spec.baseline.model_copy(update={"model": reference, "reference": None})
            spec = self.spec = spec.model_copy(update={"baseline": baseline})
        sides, precision = dict[str, JsonObject](), self.lease.read(self._precision)
        placed = list(places.values())
        for field, name in spec.models():
            side = field.removesuffix(".model")
            sides[side] = {"rendering": self.lease.read(partial(rendering_of, spec, self.job.project, side, name))}
            stack, _ = self.fetch_model(name, self.folder / "sides" / side, field)
            placed += [f"sides/{side}/{part}" for part in stack.placed]
            sides[side] |= {
                "model": name,
                "base_model": stack.model.foundation or stack.model.base_model,
                "version": stack.version,
                "quantization": spec.quantization,
                **precision,
            }
        self.completions = Counter[bool]()  # whether the judge made them → number
        for path in (self.folder / "parts").glob("*.jsonl"):
            if not path.name.startswith(f"{ANSWERS}-"):
                self.completions[_by_judge(path)] += self._line_count(path)
        located = spec.sealed(lambda _: None).with_files(places)  # without the key, as the trainer asks no endpoint
        (self.folder / "evaluation.json").write_text(located.model_dump_json())
        log = {"job": self.job.id, "attempt": self.job.attempt, "request": self.job.request_id}
        run = {
            "sides": sides,
            "beta": spec.beta,
            "attempt": self.job.attempt,
            "placed": placed,
            "log": log,
            "bases": self.bases,
            **self.health.placement(self.devices),
        }
        (self.folder / "run.json").write_text(json.dumps(run))

    def _reference(self, session: Session) -> str | None:
        """The name of the checkpoint that the SFT stage of the candidate's training has left; None without one."""
        assert self.spec.candidate is not None
        assert self.spec.candidate.model is not None
        training = models.job_of(session, self.job.project, self.spec.candidate.model)
        checkpoint = training and job_checkpoints.last_of_ended_stage(session, training.id, "sft")
        return checkpoint.model_name if checkpoint else None

    def _precision(self, session: Session) -> JsonObject:
        """The precision of the candidate's training; empty if the evaluation quantises in another way."""
        candidate = self.spec.candidate and self.spec.candidate.model
        training = models.job_of(session, self.job.project, candidate) if candidate else None
        if training is None or training.spec["quantization"] != self.spec.quantization:
            return {}
        return {name: training.spec.get(name) for name in ("double_quantization", "compute_dtype")}

    @staticmethod
    def _line_count(path: Path) -> int:
        with path.open("rb") as file:
            return sum(1 for _ in file)

    def before_write(self, event: Event) -> None:
        if isinstance(event, CompletionsWritten):
            path = self.folder / event.path
            self.lease.outlast(partial(self.services.storage.put_file, f"{self.parts_prefix}/{path.name}", path))
            self.completions[_by_judge(path)] += event.completions

    def columns(self, batch: list[Event]) -> dict[str, object]:
        columns: dict[str, object] = {"lost_attempts": Job.lost_attempts}
        for event in batch:
            if isinstance(event, CompletionsWritten):
                progress = {"completions": self.completions[_by_judge(Path(event.path))], "total": event.total}
                columns = {**PROGRESS, "progress": progress}
        return columns

    def write_event(self, session: Session, event_id: str, event: Event) -> None:
        """Write nothing. The job's progress shows the parts."""

    def _ask(self, path: Path) -> bool:
        """Ask the judge's endpoint about the items in `path` and add its verdicts; False if the attempt has ended."""
        judge = self.spec.judge
        assert judge is not None
        assert judge.endpoint is not None
        sides, services = self.spec.answer_names, self.services
        try:
            sealed = judge.endpoint.api_key
            api_key = None if sealed is None else services.secret_box.open(sealed)
        except ValueError as error:
            return self.fail("judge_refused", f"The judge's key cannot be read: {error}.", "judge.endpoint.api_key")

        def all_questions() -> Iterator[str]:
            for item in _items(path):
                yield from questions(judge, item, sides)

        keys = {key_of(question) for question in all_questions()}
        total, new_parts = len(keys), 0
        self._read_earlier_answers(keys)

        def keep(fresh: dict[str, Answer]) -> None:
            nonlocal new_parts
            name = f"{ANSWERS}-{self.job.attempt:05d}-{new_parts:05d}.jsonl"
            _write_answers(self.folder / "parts" / name, fresh)
            part = self.folder / "parts" / name
            self.lease.outlast(partial(self.services.storage.put_file, f"{self.parts_prefix}/{name}", part))
            new_parts += 1
            self.answers |= fresh
            sampled = self.completions[False]
            progress = {"completions": sampled, "total": sampled, "answers": len(self.answers), "questions": total}
            self._write(**PROGRESS, progress=progress)

        (self.folder / "parts").mkdir(exist_ok=True)
        try:
            client = JudgeClient(judge.endpoint, api_key, services.settings.private_judges)
            self.answers = client.ask_all(all_questions(), self.answers, keep, self.lease.check)
        except JudgeFailed as failed:
            return self.fail(failed.code, str(failed), "judge.endpoint")
        self._add_verdicts(path, judge)
        return True

    def _read_earlier_answers(self, keys: set[str]) -> None:
        """Add the answers that failed evaluations have paid for. `keys` are those of this evaluation's questions."""
        folder = self.folder / "earlier-answers"
        try:
            self.services.storage.get_folder(self.answers_prefix, folder)
            for key, answer in _answers(folder.glob("*.jsonl")):
                self.cached_keys.add(key)
                if key in keys:
                    self.answers.setdefault(key, answer)
        except Exception as error:  # the answers only save money
            self.log.warning("earlier answers not read", reason=str(error))

    def _add_verdicts(self, path: Path, judge: Judge) -> None:
        """Write the judge's answers and verdicts into the items in `path`."""
        sides, judged_path = self.spec.answer_names, path.with_name("judged.jsonl")
        with judged_path.open("w") as file:
            for item in _items(path):
                texts = [self.answers[key_of(question)].text for question in questions(judge, item, sides)]
                item |= {"asked": bool(texts), "verdicts": verdicts(texts, sides), "judgements": texts}
                file.write(json.dumps(item, ensure_ascii=False) + "\n")
        judged_path.replace(path)

    def _write(self, **columns: object) -> None:
        def write(session: Session) -> None:
            if not JOBS.write(session, self.job.id, self.job.attempt, **columns):
                raise LeaseLost

        self.lease.write(write)

    def fail(self, code: str, message: str, param: str | None) -> bool:
        """Fail the job, and keep the judge's new answers for later evaluations."""
        answers = self.answers.items()
        new = {key: answer for key, answer in answers if answer.text is not None and key not in self.cached_keys}
        if new:
            path = self.folder / "answers.jsonl"
            try:
                _write_answers(path, new)
                key = f"{self.answers_prefix}/{self.job.id}.jsonl"
                counted_objects.put(self.services.storage, self.services.database, self.job.project, key, path)
            except Exception as error:  # the answers only save money
                self.log.warning("answers not kept", reason=str(error))
        return super().fail(code, message, param)

    def succeed(self, outcome: TrainingDone | EvaluationDone) -> None:
        items_path, report_path = self.folder / "output" / "items.jsonl", self.folder / "report.json"
        endpoint = self.spec.judge and self.spec.judge.endpoint
        if endpoint and not self._ask(items_path):
            return
        items = [_without_texts(item) for item in _items(items_path)]
        if not items:
            self.fail("invalid_file", "No row of the data is left to evaluate.", "data")
            return
        # Imported here, so that a worker starts without NumPy.
        from worker import evaluation_figures

        report = evaluation_figures.report(self.spec, items)
        if endpoint:
            counts = [(answer.input_tokens, answer.output_tokens) for answer in self.answers.values()]
            report["judge"] = evaluation_figures.judge_usage(endpoint.price, counts)
        metrics = evaluation_figures.flatten(report)
        verdicts = quality_gates.judge(self.spec.gates or [], metrics)
        report_path.write_text(json.dumps(report, indent=1, allow_nan=False))
        stored = [self.store_result(report_path, "report.json"), self.store_result(items_path, "items.jsonl")]

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
                f"The evaluation has succeeded: {evaluation_figures.summary(report)}",
                result_files=[file.id for file in results],
                metrics=metrics,
                gates=verdicts or None,
            )
            session.add_all(results)

        self.lease.write(write)


def rendering_of(spec: EvaluationSpec, project: str, side: str, name: str, session: Session) -> JsonObject:
    """How the model `name` of a side renders conversations.

    The candidate follows the evaluation's settings. So does the baseline, if it is a base model or if the evaluation
    has type `preference`, which compares log-probs of the same texts. All other trained models render as in their own
    training. A judge that is a base model renders by the defaults.
    """
    training = models.job_of(session, project, name)
    if training is not None and side != "candidate" and not (side == "baseline" and spec.type == "preference"):
        return vars(JobSpec.stored(training.spec).rendering)
    if side == "judge":  # the candidate's settings do not concern a base model that judges
        return vars(RenderingSettings(date=spec.date).rendering)
    return vars(spec.rendering)


def _by_judge(part: Path) -> bool:
    """Whether a part holds completions of a model that judges. They are counted separately."""
    return part.name.startswith("judge-")


def _items(path: Path) -> Iterator[JsonObject]:
    with path.open() as file:
        yield from map(json.loads, file)


def _write_answers(path: Path, answers: dict[str, Answer]) -> None:
    lines = (json.dumps({"key": key, **vars(answer)}) + "\n" for key, answer in answers.items())
    path.write_text("".join(lines))


def _answers(paths: Iterable[Path]) -> Iterator[tuple[str, Answer]]:
    """(key of the question, answer) of each line in `paths`."""
    for path in paths:
        for line in path.read_text().splitlines():
            fields = json.loads(line)
            yield fields.pop("key"), Answer(**fields)


def _without_texts(item: JsonObject) -> JsonObject:
    """An item without its texts. They take most of its memory, and no figure needs them."""
    return {name: value for name, value in item.items() if not isinstance(value, str) and name != "judgements"}
