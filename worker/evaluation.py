"""One attempt at an evaluation: the models that it compares, what it has sampled so far, the report that it leaves."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.database import new_id
from app.evaluations.spec import EvaluationSpec
from app.jobs.states import Status
from app.jobs.tables import Job
from app.models import repository as models
from worker.base_models import ModelUnavailable
from worker.runner import Run


class Evaluation(Run[EvaluationSpec]):
    """One attempt at an evaluation."""

    OVERDUE = "What it had sampled is lost: ask for less, or give it more time."

    @staticmethod
    def read_spec(job: Job) -> EvaluationSpec:
        return EvaluationSpec.stored(job.spec)

    @property
    def parts(self) -> str:
        """Where completions are kept for the attempts that follow."""
        return f"jobs/{self.job.id}/parts"

    def prepare(self) -> bool:
        spec = self.spec
        places = {field: f"data/{file_id}" for field, file_id in spec.files()}
        for field, file_id in spec.files():
            try:
                self.services.storage.get_file(f"files/{file_id}", self.folder / places[field])
            except FileNotFoundError as error:
                return self.fail("file_not_found", f"A file of the evaluation is gone: {error}", field)
        sides = {}
        for field, name in spec.models():
            side = field.removesuffix(".model")
            found, foundation, version = self.lease.read(partial(self._look, name))
            if found is None or (found.foundation and foundation is None):
                return self.fail("model_not_found", f"The model '{name}' was deleted.", field)
            folder = self.folder / "sides" / side
            folder.parent.mkdir(exist_ok=True)
            if found.kind == "reward" and found.prefix is not None:  # whole, its base model in it
                self.services.storage.get_folder(found.prefix, folder / "base")
                continue
            try:
                base, _ = self.base_models.locate(found.base_model)
            except ModelUnavailable as error:
                return self.fail("model_unavailable", str(error), field)
            self.place(found, foundation, base, folder)
            sides[side] = {
                "model": name,
                "base_model": found.foundation or found.base_model,
                "version": version,
                "quantization": spec.quantization,
            }
        self.services.storage.get_folder(self.parts, self.folder / "parts")
        self.kept = sum(self._completions(path) for path in (self.folder / "parts").glob("*.jsonl"))
        (self.folder / "evaluation.json").write_text(spec.with_files(places).model_dump_json())
        log = {"job": self.job.id, "attempt": self.job.attempt, "request": self.job.request_id}
        run = {"sides": sides, "beta": spec.beta, "attempt": self.job.attempt, "log": log}
        (self.folder / "run.json").write_text(json.dumps(run))
        return True

    def _look(self, name: str, session: Session) -> tuple[models.Found | None, models.Found | None, str | None]:
        """(what a name stands for, the trained model that it sits on, the version of its base model)"""
        found = models.find(session, self.job.project, name)
        if found is None:
            return None, None, None
        below = models.find(session, self.job.project, found.foundation) if found.foundation else None
        return found, below, models.version(session, found.base_model)

    @staticmethod
    def _completions(path: Path) -> int:
        with path.open("rb") as file:
            return sum(1 for _ in file)

    def bring(self, event: dict[str, Any]) -> None:
        if event["kind"] == "part":
            path = self.folder / event["path"]
            self.services.storage.put_file(f"{self.parts}/{path.name}", path)
            self.kept += event["completions"]

    def columns(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        columns: dict[str, Any] = {"lost_attempts": Job.lost_attempts}
        for event in batch:
            if event["kind"] == "part":
                columns = {"lost_attempts": 0, "progress": {"completions": self.kept, "total": event["total"]}}
        return columns

    def write_event(self, session: Session, event_id: str, event: dict[str, Any]) -> None:
        """Parts are seen in the progress."""

    def succeed(self, outcome: dict[str, Any]) -> None:
        items_path, report_path = self.folder / "output" / "items.jsonl", self.folder / "report.json"
        with items_path.open() as file:
            items = [_figures(json.loads(line)) for line in file]
        if not items:
            self.fail("invalid_file", "No row of the data is left to evaluate.", "data")
            return
        # Imported here: the API's image, in which the CPU lane runs, has no NumPy.
        from worker import reports

        report = reports.report(self.spec, items)
        report_path.write_text(json.dumps(report, indent=1, allow_nan=False))
        made = {new_id("file"): ("report.json", report_path), new_id("file"): ("items.jsonl", items_path)}
        for file_id, (_, path) in made.items():
            self.services.storage.put_file(f"files/{file_id}", path)

        def write(session: Session) -> None:
            self.end(
                session,
                Status.SUCCEEDED,
                f"The evaluation has succeeded: {reports.summary(report)}",
                result_files=list(made),
                metrics=reports.flat(report),
            )
            for file_id, (name, path) in made.items():
                session.add(self.result_file(file_id, path, name))

        self.lease.write(write)


def _figures(item: dict[str, Any]) -> dict[str, Any]:
    """What figures are made of: not the texts, which are most of an item."""
    return {name: value for name, value in item.items() if not isinstance(value, str)}
