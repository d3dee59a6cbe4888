"""One attempt at an evaluation: the models that it compares, what it has sampled so far, the report that it leaves."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.database import new_id
from app.jobs import checkpoints as job_checkpoints
from app.jobs import events as job_events
from app.jobs.queue import JOBS
from app.jobs.states import Status
from app.jobs.tables import Job
from app.models import repository as models
from app.spec import quality_gates
from app.spec.datasets.rendering import RenderingSettings
from app.spec.evaluation import EvaluationSpec
from app.spec.job import JobSpec
from worker.judges.endpoint import Answer, Asker, JudgeFailed, key_of
from worker.judges.questions import questions, verdicts
from worker.lease import LeaseLost
from worker.runner import Attempt, Unfit
from worker.trainer.events import CompletionsWritten, EvaluationDone, Event, TrainingDone


class _BrokenOff(Exception):
    """The judge is not asked on: the attempt was asked to stop."""


ANSWERS = "answers"
"""What the parts with a judge's answers are called; the others hold completions."""


class Evaluation(Attempt[EvaluationSpec]):
    """One attempt at an evaluation."""

    OVERDUE = "What it had sampled is lost: ask for less, or give it more time."

    @staticmethod
    def read_spec(job: Job) -> EvaluationSpec:
        return EvaluationSpec.stored(job.spec)

    @property
    def parts(self) -> str:
        """Where completions are kept for the attempts that follow. 2: by the numbers that rows have in their file."""
        return f"jobs/{self.job.id}/parts-2"

    @property
    def shelf(self) -> str:
        """Where the answers of a judge stay that evaluations were given before they failed: paid for, and of use to the
        next one that asks it the same."""
        judge = self.spec.judge
        assert judge is not None
        assert judge.endpoint is not None
        asked = judge.endpoint.model_dump(mode="json", include={"base_url", "model", "parameters"})
        digest = sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return f"cache/judgements/{self.job.project}/{digest}"

    def prepare(self) -> None:
        spec = self.spec
        self.services.storage.get_folder(self.parts, self.folder / "parts")
        self.answers = dict(_answers((self.folder / "parts").glob(f"{ANSWERS}-*.jsonl")))
        self.shelved = set[str]()
        places = {field: f"data/{file_id}" for field, file_id in spec.files()}
        for field, file_id in spec.files():
            self.fetch_file(file_id, self.folder / places[field], field)
        if spec.baseline is not None and spec.baseline.reference:
            left = self.lease.read(self._reference)
            if left is None:
                message = "What the SFT stage of the candidate's training left is not there any more."
                raise Unfit("model_not_found", message, "baseline")
            named = spec.baseline.model_copy(update={"model": left, "reference": None})
            spec = self.spec = spec.model_copy(update={"baseline": named})
        sides, precision = dict[str, dict[str, Any]](), self.lease.read(self._precision)
        for field, name in spec.models():
            side = field.removesuffix(".model")
            sides[side] = {"rendering": self.lease.read(partial(rendering_of, spec, self.job.project, side, name))}
            found, _ = self.fetch_model(name, self.folder / "sides" / side, field)
            sides[side] |= {
                "model": name,
                "base_model": found.model.foundation or found.model.base_model,
                "version": found.version,
                "quantization": spec.quantization,
                **precision,
            }
        self.kept = Counter[bool]()
        for path in (self.folder / "parts").glob("*.jsonl"):
            if not path.name.startswith(f"{ANSWERS}-"):
                self.kept[_by_judge(path)] += self._completions(path)
        located = spec.sealed(lambda _: None).with_files(places)  # the trainer asks no endpoint
        (self.folder / "evaluation.json").write_text(located.model_dump_json())
        log = {"job": self.job.id, "attempt": self.job.attempt, "request": self.job.request_id}
        run = {"sides": sides, "beta": spec.beta, "attempt": self.job.attempt, "log": log}
        (self.folder / "run.json").write_text(json.dumps(run))

    def _reference(self, session: Session) -> str | None:
        """The name of what the SFT stage of the candidate's training left."""
        assert self.spec.candidate is not None
        assert self.spec.candidate.model is not None
        made = models.job_of(session, self.job.project, self.spec.candidate.model)
        left = made and job_checkpoints.left_by(session, made.id, "sft")
        return left.model_name if left else None

    def _precision(self, session: Session) -> dict[str, Any]:
        """How the candidate's training quantised its base and computed, where the evaluation does it so too."""
        candidate = self.spec.candidate and self.spec.candidate.model
        made = models.job_of(session, self.job.project, candidate) if candidate else None
        if made is None or made.spec["quantization"] != self.spec.quantization:
            return {}
        return {name: made.spec.get(name) for name in ("double_quantization", "compute_dtype")}

    @staticmethod
    def _completions(path: Path) -> int:
        with path.open("rb") as file:
            return sum(1 for _ in file)

    def bring(self, event: Event) -> None:
        if isinstance(event, CompletionsWritten):
            path = self.folder / event.path
            self.services.storage.put_file(f"{self.parts}/{path.name}", path)
            self.kept[_by_judge(path)] += event.completions

    def columns(self, batch: list[Event]) -> dict[str, Any]:
        columns: dict[str, Any] = {"lost_attempts": Job.lost_attempts}
        for event in batch:
            if isinstance(event, CompletionsWritten):
                progress = {"completions": self.kept[_by_judge(Path(event.path))], "total": event.total}
                columns = {"lost_attempts": 0, "progress": progress}
        return columns

    def write_event(self, session: Session, event_id: str, event: Event) -> None:
        """Parts are seen in the progress."""

    def _ask(self, path: Path) -> bool:
        """Ask the endpoint about the items in `path`, and add what it says; False where the attempt ended instead."""
        judge = self.spec.judge
        assert judge is not None
        assert judge.endpoint is not None
        sides, services = self.spec.sides_named, self.services
        try:
            sealed = judge.endpoint.api_key
            opened = None if sealed is None else services.vault.open(sealed)
        except ValueError as error:
            return self.fail("judge_refused", f"The judge's key cannot be read: {error}.", "judge.endpoint.api_key")

        def asked() -> Iterator[str]:
            for item in _items(path):
                yield from questions(judge, item, sides)

        keys = {key_of(question) for question in asked()}
        total, new_parts = len(keys), 0
        try:
            services.storage.get_folder(self.shelf, self.folder / "shelf")
            for key, answer in _answers((self.folder / "shelf").glob("*.jsonl")):
                self.shelved.add(key)
                if key in keys:
                    self.answers.setdefault(key, answer)
        except Exception as error:  # it saves money, and no more
            self.log.warning("earlier answers not read", reason=str(error))

        def keep(fresh: dict[str, Answer]) -> None:
            nonlocal new_parts
            name = f"{ANSWERS}-{self.job.attempt:05d}-{new_parts:05d}.jsonl"
            _write_answers(self.folder / "parts" / name, fresh)
            self.services.storage.put_file(f"{self.parts}/{name}", self.folder / "parts" / name)
            new_parts += 1
            self.answers |= fresh
            sampled = self.kept[False]
            progress = {"completions": sampled, "total": sampled, "answers": len(self.answers), "questions": total}
            self._write(lost_attempts=0, progress=progress)

        def tick() -> None:
            if self.lease.lost:
                raise LeaseLost
            if self.asked_to_stop:
                raise _BrokenOff

        (self.folder / "parts").mkdir(exist_ok=True)
        try:
            asker = Asker(judge.endpoint, opened, services.settings.private_judges)
            self.answers = asker.ask_all(asked(), self.answers, keep, tick)
        except JudgeFailed as failed:
            return self.fail(failed.code, str(failed), "judge.endpoint")
        except _BrokenOff:
            self.give_back()
            return False
        told = path.with_name("judged.jsonl")
        with told.open("w") as file:
            for item in _items(path):
                found = [self.answers[key_of(question)].text for question in questions(judge, item, sides)]
                item |= {"asked": bool(found), "verdicts": verdicts(found, sides), "judgements": found}
                file.write(json.dumps(item, ensure_ascii=False) + "\n")
        told.replace(path)
        return True

    def _write(self, **columns: Any) -> None:
        def write(session: Session) -> None:
            if not JOBS.write(session, self.job.id, self.job.attempt, **columns):
                raise LeaseLost

        self.lease.write(write)

    def fail(self, code: str, message: str, param: str | None) -> bool:
        given = {key: one for key, one in self.answers.items() if one.text is not None and key not in self.shelved}
        if given:
            place = self.folder / "answers.jsonl"
            try:
                _write_answers(place, given)
                self.services.storage.put_file(f"{self.shelf}/{self.job.id}.jsonl", place)
            except Exception as error:  # it saves money, and no more
                self.log.warning("answers not kept", reason=str(error))
        return super().fail(code, message, param)

    def succeed(self, outcome: TrainingDone | EvaluationDone) -> None:
        items_path, report_path = self.folder / "output" / "items.jsonl", self.folder / "report.json"
        endpoint = self.spec.judge and self.spec.judge.endpoint
        if endpoint and not self._ask(items_path):
            return
        items = [_figures(item) for item in _items(items_path)]
        if not items:
            self.fail("invalid_file", "No row of the data is left to evaluate.", "data")
            return
        # Imported here: the API's image, in which the CPU lane runs, has no NumPy.
        from worker import evaluation_figures

        report = evaluation_figures.report(self.spec, items)
        if endpoint:
            counts = [(answer.input_tokens, answer.output_tokens) for answer in self.answers.values()]
            report["judge"] = evaluation_figures.asked(endpoint.price, counts)
        metrics = evaluation_figures.flat(report)
        verdicts = quality_gates.judge(self.spec.gates or [], metrics)
        report_path.write_text(json.dumps(report, indent=1, allow_nan=False))
        made = {new_id("file"): ("report.json", report_path), new_id("file"): ("items.jsonl", items_path)}
        for file_id, (_, path) in made.items():
            self.services.storage.put_file(f"files/{file_id}", path)

        def write(session: Session) -> None:
            if verdicts:
                if not JOBS.write(session, self.job.id, self.job.attempt, gates=verdicts):
                    raise LeaseLost
                job_events.add(
                    session, self.job.id, quality_gates.summary(verdicts), level=quality_gates.level(verdicts)
                )
            self.end(
                session,
                Status.SUCCEEDED,
                f"The evaluation has succeeded: {evaluation_figures.summary(report)}",
                result_files=list(made),
                metrics=metrics,
                gates=verdicts or None,
            )
            for file_id, (name, path) in made.items():
                session.add(self.result_file(file_id, path, name))

        self.lease.write(write)


def rendering_of(spec: EvaluationSpec, project: str, side: str, name: str, session: Session) -> dict[str, Any]:
    """How the model `name` of a side reads conversations: as it was trained; the candidate, as the evaluation says.

    Pairs are the same texts for both sides: their log-probs are compared, as in the training.
    """
    made = models.job_of(session, project, name)
    if made is not None and side != "candidate" and not (side == "baseline" and spec.type == "preference"):
        return vars(JobSpec.stored(made.spec).rendering)
    if side == "judge":  # a base model that is asked has its own habits, not those of the candidate
        return vars(RenderingSettings(date=spec.date).rendering)
    return vars(spec.rendering)


def _by_judge(part: Path) -> bool:
    """Whether a part holds what a model said as the judge, which is counted for itself."""
    return part.name.startswith("judge-")


def _items(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        yield from map(json.loads, file)


def _write_answers(path: Path, answers: dict[str, Answer]) -> None:
    lines = (json.dumps({"key": key, **vars(answer)}) + "\n" for key, answer in answers.items())
    path.write_text("".join(lines))


def _answers(paths: Iterable[Path]) -> Iterator[tuple[str, Answer]]:
    """What a judge said earlier, by the questions' keys."""
    for path in paths:
        for line in path.read_text().splitlines():
            found = json.loads(line)
            yield found.pop("key"), Answer(**found)


def _figures(item: dict[str, Any]) -> dict[str, Any]:
    """What figures are made of: not the texts, which are most of an item."""
    return {name: value for name, value in item.items() if not isinstance(value, str) and name != "judgements"}
