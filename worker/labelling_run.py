"""One attempt at a labelling: its writers, its labellers, its file of ranked answers and its report."""

import json
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

from sqlalchemy.orm import Session

from app.jobs.states import Status
from app.jobs.tables import Job
from app.labellings import queue as label_queue
from app.labellings.queue import PEOPLE
from app.models import repository as models
from app.spec.datasets.rendering import RenderingSettings
from app.spec.evaluation import Endpoint
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec, WriterEndpoint
from worker import comparisons
from worker.answers import distinct, messages_of, row_of
from worker.endpoints.asking import used
from worker.endpoints.client import Question, Role
from worker.runner import Done
from worker.sides_attempt import ANSWERS, SidesAttempt, change_items, read_items

WRITER: Role = "writer"
JUDGE: Role = "judge"


class Labelling(SidesAttempt[LabellingSpec]):
    """One attempt at a labelling."""

    SPEC_FILE = "labelling.json"
    JUDGES = "labellers."

    @staticmethod
    def read_spec(job: Job) -> LabellingSpec:
        return LabellingSpec.stored(job.spec)

    def prepare(self) -> None:
        self.items_path = self.folder / "output" / "items.jsonl"
        self.people_have_labelled = self.lease.read(lambda session: label_queue.exists(session, self.job.id))
        self.fetch_parts()
        if self.people_have_labelled:
            self.services.storage.get_file(self.items_key, self.items_path)
            self.services.storage.get_file(self.usage_key, self.folder / "usage.json")
        else:
            self.place(self.spec)

    @property
    def items_key(self) -> str:
        """The key of the items with the labels of all but people, while these label."""
        return f"jobs/{self.job.id}/items.jsonl"

    @property
    def usage_key(self) -> str:
        """The key of the endpoints' usage until then."""
        return f"jobs/{self.job.id}/usage.json"

    def _usage(self) -> list[JsonObject]:
        """The answers, tokens and cost of each endpoint."""
        path = self.folder / "usage.json"
        if path.exists():
            usage: list[JsonObject] = json.loads(path.read_text())
            return usage
        return [used(asking) for asking in self.asking.values()]

    def work(self) -> None:
        if self.people_have_labelled:
            self._add_people(self.items_path)
            self._end(self.items_path)
        else:
            self.run_trainer()

    def rendering(self, session: Session, side: str, name: str) -> JsonObject:
        return rendering_of(self.spec, self.job.project, side, name, session)

    def endpoints(self) -> list[tuple[str, Endpoint, Role]]:
        writers = [(_part("writers", k), one.endpoint, WRITER) for k, one in enumerate(self.spec.writers)]
        judges = [(_part("labellers", k), one.endpoint, JUDGE) for k, one in enumerate(self.spec.labellers)]
        return [(name, endpoint, role) for name, endpoint, role in (*writers, *judges) if endpoint is not None]

    def measured_by(self) -> str | None:
        return next((writer.model for writer in self.spec.writers if writer.model is not None), None)

    def succeed(self, outcome: Done) -> None:
        items_path, answered_path = self.items_path, self.folder / "answered.jsonl"
        writers = [(number, writer.endpoint) for number, writer in enumerate(self.spec.writers) if writer.endpoint]
        if writers and not answered_path.exists():
            for number, endpoint in writers:
                if not self._write(items_path, number, endpoint):
                    return
            if any(labeller.is_local for labeller in self.spec.labellers):
                items_path.rename(answered_path)
                self.run_trainer()  # it labels all answers, and ends here again
                return
            change_items(items_path, distinct)
        for number, labeller in enumerate(self.spec.labellers):
            if labeller.endpoint is not None and not self._judge(items_path, number):
                return
        if self.spec.people is None:
            self._end(items_path)
        else:
            self._ask_people(items_path)

    def _write(self, path: Path, number: int, endpoint: WriterEndpoint) -> bool:
        """Ask a writer's endpoint for its answers to the items in `path`, and add them. False if the job has failed."""
        sampling = self.spec.sampling
        assert sampling is not None
        asking = self.asks(endpoint, _part("writers", number), WRITER)
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
                fields |= {"tools": tools} if tools else {}
                yield place, Question.of_prompt(messages, fields, f"{number}.{place}")

        def all_questions() -> Iterator[Question]:
            return (question for item in read_items(path) for _, question in asked(item))

        if not self.ask(asking, all_questions, f"writers.{number}.endpoint"):
            return False

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
        judge = labeller.judge
        assert judge is not None
        assert judge.endpoint is not None
        asking = self.asks(judge.endpoint, _part("labellers", number), JUDGE)

        def asked(item: JsonObject) -> list[Question]:
            texts = [answer["text"] for answer in item["answers"]]
            return [Question.of_text(text) for text in comparisons.all_questions(judge, item["prompt"], texts)]

        def all_questions() -> Iterator[Question]:
            return (question for item in read_items(path) for question in asked(item))

        if not self.ask(asking, all_questions, f"labellers.{number}.judge.endpoint"):
            return False

        def add(item: JsonObject) -> JsonObject:
            replies = iter([asking.answers[question.key].text for question in asked(item)])
            texts = [answer["text"] for answer in item["answers"]]
            item["labels"][labeller.title] = comparisons.label(judge, item["prompt"], texts, replies)
            return item

        change_items(path, add)
        return True

    def _ask_people(self, path: Path) -> None:
        """Give the items in `path` to people, and put the job aside until they have labelled them."""
        many = [
            (number, {"prompt": item["prompt"], "answers": [answer["text"] for answer in item["answers"]]})
            for number, item in enumerate(read_items(path))
            if len(item["answers"]) > 1
        ]
        if not many:
            self.fail("nothing_to_compare", "No prompt has two different answers to compare.", "labellers")
            return
        usage_path = self.folder / "usage.json"
        usage_path.write_text(json.dumps(self._usage()))
        self.store(partial(self.services.storage.put_file, self.items_key, path))
        self.store(partial(self.services.storage.put_file, self.usage_key, usage_path))

        def write(session: Session) -> None:
            self.end(session, Status.QUEUED, f"People can label {len(many)} prompts.", awaits=PEOPLE)
            label_queue.add(session, self.job.id, many)

        self.lease.write(write)

    def _add_people(self, path: Path) -> None:
        """Add the labels of people to the items in `path`."""
        (title,) = (labeller.title for labeller in self.spec.labellers if labeller.people is not None)
        verdicts = self.lease.read(lambda session: label_queue.verdicts(session, self.job.id))
        shown = self.lease.read(lambda session: label_queue.answers(session, self.job.id))
        numbers = count()

        def add(item: JsonObject) -> JsonObject:
            number = next(numbers)
            texts = [answer["text"] for answer in item["answers"]]
            if shown.get(number, texts) != texts:  # an attempt that lost its lease wrote the items later
                raise RuntimeError(f"the items of {self.job.id} are not those that people have labelled")
            found = verdicts.get(number, [])
            rankings = {verdict.annotator: verdict.ranking for verdict in found if verdict.ranking is not None}
            flags = [verdict.flag for verdict in found if verdict.flag is not None]
            item["labels"][title] = comparisons.label_of_people(len(item["answers"]), rankings, flags)
            return item

        change_items(path, add)

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
        if usage := self._usage():
            report["endpoints"] = usage
        report_path.write_text(json.dumps(report, indent=1, allow_nan=False))
        metrics = labelling_figures.metrics(self.spec, report)
        stored = [
            self.store_result(rows_path, f"{self.job.id}.jsonl", "fine-tune"),
            self.store_result(report_path, "report.json"),
            self.store_result(items_path, "items.jsonl"),
        ]
        summary = labelling_figures.summary(metrics)
        self.finish(f"The labelling has succeeded: {summary}", metrics, self.spec.gates or [], stored)


def _part(group: str, number: int) -> str:
    """The beginning of the names of the parts with an endpoint's answers."""
    return f"{ANSWERS}.{group}.{number}"


def rendering_of(spec: LabellingSpec, project: str, side: str, name: str, session: Session) -> JsonObject:
    """How the model `name` of a side renders conversations: as in its training.

    A base model that writes follows the settings of the labelling, and one that judges the defaults.
    """
    training = models.job_of(session, project, name)
    if training is not None:
        return vars(JobSpec.stored(training.spec).rendering)
    return vars(RenderingSettings(date=spec.date).rendering if side.startswith("labellers.") else spec.rendering)
