"""One attempt at an evaluation: its models, its completions so far, its judge and its report."""

import json
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.orm import Session

from app.jobs import checkpoints as job_checkpoints
from app.jobs.tables import Job
from app.models import repository as models
from app.spec.datasets.rendering import RenderingSettings
from app.spec.evaluation import Endpoint, EvaluationSpec
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from worker.endpoints.client import Question, Role
from worker.judge import questions, verdicts
from worker.runner import CannotRun, Done
from worker.sides_attempt import ANSWERS, SidesAttempt, change_items, read_items


class Evaluation(SidesAttempt[EvaluationSpec]):
    """One attempt at an evaluation."""

    SPEC_FILE = "evaluation.json"
    JUDGES = "judge-"

    @staticmethod
    def read_spec(job: Job) -> EvaluationSpec:
        return EvaluationSpec.stored(job.spec)

    def prepare(self) -> None:
        self.fetch_parts()
        spec = self.spec
        if spec.baseline is not None and spec.baseline.reference:
            reference = self.lease.read(self._reference)
            if reference is None:
                message = "The checkpoint of the SFT stage of the candidate's training does not exist any more."
                raise CannotRun("model_not_found", message, "baseline")
            baseline = spec.baseline.model_copy(update={"model": reference, "reference": None})
            spec = self.spec = spec.model_copy(update={"baseline": baseline})
        self.place(spec, beta=spec.beta)

    def rendering(self, session: Session, side: str, name: str) -> JsonObject:
        return rendering_of(self.spec, self.job.project, side, name, session)

    def endpoints(self) -> list[tuple[str, Endpoint, Role]]:
        endpoint = self.spec.judge.endpoint if self.spec.judge is not None else None
        return [(ANSWERS, endpoint, "judge")] if endpoint is not None else []

    def measured_by(self) -> str | None:
        return self.spec.candidate.model if self.spec.candidate is not None else None

    def _reference(self, session: Session) -> str | None:
        """The name of the checkpoint that the SFT stage of the candidate's training has left; None without one."""
        assert self.spec.candidate is not None
        assert self.spec.candidate.model is not None
        training = models.job_of(session, self.job.project, self.spec.candidate.model)
        checkpoint = training and job_checkpoints.last_of_ended_stage(session, training.id, "sft")
        return checkpoint.model_name if checkpoint else None

    def _ask(self, path: Path) -> bool:
        """Ask the judge's endpoint about the items in `path` and add its verdicts; False if the attempt has ended."""
        judge, sides = self.spec.judge, self.spec.answer_names
        assert judge is not None
        assert judge.endpoint is not None
        asking = self.asks(judge.endpoint, ANSWERS, "judge")

        def all_questions() -> Iterator[Question]:
            for item in read_items(path):
                yield from map(Question.of_text, questions(judge, item, sides))

        if not self.ask(asking, all_questions, "judge.endpoint"):
            return False

        def add(item: JsonObject) -> JsonObject:
            asked = map(Question.of_text, questions(judge, item, sides))
            texts = [asking.answers[question.key].text for question in asked]
            return item | {"asked": bool(texts), "verdicts": verdicts(texts, sides), "judgements": texts}

        change_items(path, add)
        return True

    def succeed(self, outcome: Done) -> None:
        items_path, report_path = self.folder / "output" / "items.jsonl", self.folder / "report.json"
        endpoint = self.spec.judge and self.spec.judge.endpoint
        if endpoint and not self._ask(items_path):
            return
        items = [_without_texts(item) for item in read_items(items_path)]
        if not items:
            self.fail("invalid_file", "No row of the data is left to evaluate.", "data")
            return
        # Imported here, so that a worker starts without NumPy.
        from worker import evaluation_figures

        report = evaluation_figures.report(self.spec, items)
        if endpoint:
            tokens = self.asks(endpoint, ANSWERS, "judge").tokens
            report["judge"] = evaluation_figures.judge_usage(endpoint.price, tokens)
        metrics = evaluation_figures.flatten(report)
        report_path.write_text(json.dumps(report, indent=1, allow_nan=False))
        stored = [self.store_result(report_path, "report.json"), self.store_result(items_path, "items.jsonl")]
        summary = evaluation_figures.summary(report)
        self.finish(f"The evaluation has succeeded: {summary}", metrics, self.spec.gates or [], stored)


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


def _without_texts(item: JsonObject) -> JsonObject:
    """An item without its texts. They take most of its memory, and no figure needs them."""
    return {name: value for name, value in item.items() if not isinstance(value, str) and name != "judgements"}
