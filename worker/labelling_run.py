"""One attempt at a labelling: its writers, its labellers, its file of ranked answers and its report."""

import json
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.orm import Session

from app.jobs.tables import Job
from app.models import repository as models
from app.spec.datasets.rendering import RenderingSettings
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec, WriterEndpoint
from worker import comparisons
from worker.answers import distinct, messages_of, row_of
from worker.endpoints.client import EndpointFailed, Question
from worker.runner import Done
from worker.sides_attempt import ANSWERS, SidesAttempt, change_items, read_items


class Labelling(SidesAttempt[LabellingSpec]):
    """One attempt at a labelling."""

    SPEC_FILE = "labelling.json"
    JUDGES = "labellers."

    @staticmethod
    def read_spec(job: Job) -> LabellingSpec:
        return LabellingSpec.stored(job.spec)

    def prepare(self) -> None:
        self.fetch_parts()
        self.place(self.spec)

    def rendering(self, session: Session, side: str, name: str) -> JsonObject:
        return rendering_of(self.spec, self.job.project, side, name, session)

    def measured_by(self) -> str | None:
        return next((writer.model for writer in self.spec.writers if writer.model is not None), None)

    def succeed(self, outcome: Done) -> None:
        items_path, answered_path = self.folder / "output" / "items.jsonl", self.folder / "answered.jsonl"
        writers = [(number, writer.endpoint) for number, writer in enumerate(self.spec.writers) if writer.endpoint]
        if writers and not answered_path.exists():
            for number, endpoint in writers:
                if not self._write(items_path, number, endpoint):
                    return
            if any(labeller.endpoint is None for labeller in self.spec.labellers):
                items_path.rename(answered_path)
                self.run_trainer()  # it labels all answers, and ends here again
                return
            change_items(items_path, distinct)
        for number, labeller in enumerate(self.spec.labellers):
            if labeller.endpoint is not None and not self._judge(items_path, number):
                return
        self._end(items_path)

    def _write(self, path: Path, number: int, endpoint: WriterEndpoint) -> bool:
        """Ask a writer's endpoint for its answers to the items in `path`, and add them. False if the job has failed."""
        sampling, field = self.spec.sampling, f"writers.{number}.endpoint"
        assert sampling is not None
        asking = self.asks(endpoint, f"{ANSWERS}.writers.{number}", "writer")
        places = [
            (k * sampling.samples + sample, temperature)
            for k, temperature in enumerate(sampling.temperatures)
            for sample in range(sampling.samples if temperature else 1)
        ]

        def asked(item: JsonObject) -> Iterator[tuple[int, Question]]:
            messages, tools = messages_of(item["source"]), item["source"].get("tools")
            for place, temperature in places:
                fields: JsonObject = {"temperature": temperature, "max_tokens": sampling.max_tokens}
                fields |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
                yield place, Question.of_prompt(messages, fields | ({"tools": tools} if tools else {}), place)

        try:
            asking.ask(
                lambda: (question for item in read_items(path) for _, question in asked(item)), self.report_answers
            )
        except EndpointFailed as failed:
            return self.fail(failed.code, str(failed), field)

        def add(item: JsonObject) -> JsonObject:
            for place, question in asked(item):
                answer = asking.answers[question.key]
                item["answers"].append({"writer": number, "place": place, "text": answer.text, "ended": answer.ended})
            return item

        change_items(path, add)
        return True

    def _judge(self, path: Path, number: int) -> bool:
        """Ask a judge's endpoint about the items in `path`, and add its labels. False if the job has failed."""
        labeller = self.spec.labellers[number]
        judge, field = labeller.judge, f"labellers.{number}.judge.endpoint"
        assert judge is not None
        assert judge.endpoint is not None
        asking = self.asks(judge.endpoint, f"{ANSWERS}.labellers.{number}", "judge")

        def asked(item: JsonObject) -> list[Question]:
            texts = [answer["text"] for answer in item["answers"]]
            return [Question.of_text(text) for text in comparisons.all_questions(judge, item["prompt"], texts)]

        def all_questions() -> Iterator[Question]:
            return (question for item in read_items(path) for question in asked(item))

        try:
            asking.ask(all_questions, self.report_answers)
        except EndpointFailed as failed:
            return self.fail(failed.code, str(failed), field)

        def add(item: JsonObject) -> JsonObject:
            replies = iter([asking.answers[question.key].text for question in asked(item)])
            texts = [answer["text"] for answer in item["answers"]]
            item["labels"][labeller.title] = comparisons.label(judge, item["prompt"], texts, replies)
            return item

        change_items(path, add)
        return True

    def _end(self, items_path: Path) -> None:
        """Write the file of ranked answers and the report, and end the job."""
        # Imported here, so that a worker starts without NumPy.
        from worker import labelling_figures

        rows_path, report_path = self.folder / "rows.jsonl", self.folder / "report.json"
        with rows_path.open("w") as file:
            rows = (row for item in read_items(items_path) if (row := row_of(self.spec, item)) is not None)
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        report = labelling_figures.report(self.spec, read_items(items_path))
        if not report["rows"]:
            message = "No prompt has two different answers whose scores differ: there is nothing to learn from."
            self.fail("nothing_to_compare", message, "labellers.0")
            return
        if self.asking:
            report["endpoints"] = labelling_figures.usage(self.asking.values())
        report_path.write_text(json.dumps(report, indent=1, allow_nan=False))
        metrics = labelling_figures.metrics(self.spec, report)
        stored = [
            self.store_result(rows_path, f"{self.job.id}.jsonl", "fine-tune"),
            self.store_result(report_path, "report.json"),
            self.store_result(items_path, "items.jsonl"),
        ]
        summary = labelling_figures.summary(metrics)
        self.finish(f"The labelling has succeeded: {summary}", metrics, self.spec.gates or [], stored)


def rendering_of(spec: LabellingSpec, project: str, side: str, name: str, session: Session) -> JsonObject:
    """How the model `name` of a side renders conversations: as in its training.

    A base model that writes follows the settings of the labelling, and one that judges the defaults.
    """
    training = models.job_of(session, project, name)
    if training is not None:
        return vars(JobSpec.stored(training.spec).rendering)
    return vars(RenderingSettings(date=spec.date).rendering if side.startswith("labellers.") else spec.rendering)
