"""The tasks of the reader: each takes JSON and returns JSON."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from app.spec.datasets.check import check, survey
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Kind
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.report import Report
from app.spec.json_types import JsonObject
from worker.classifier import BadClassifier, LinearClassifier
from worker.trainer.counting import count_folder


def do(folder: Path, task: JsonObject) -> object:
    """The result of a task. `folder` holds what it names."""
    return TASKS[task["name"]](folder, task)


def _survey(_folder: Path, task: JsonObject) -> JsonObject:
    """The report of the file `dataset`, read by `mapping`."""
    with Path(task["dataset"]).open("rb") as file:
        return survey(file, _mapping(task)).as_json()


def _check(_folder: Path, task: JsonObject) -> JsonObject:
    """Check that the rows of `files` fit a job. Each has its `field`, `path`, `mapping`, and what the job `needs`.

    Returns the `outlines` of the files by field, and the `repeats`: by the field of a validation file, how many of its
    rows have a prompt of the files in `trained`. A file that does not fit gives `invalid`: {field, reason}.
    """
    reports: dict[str, Report] = {}
    for file in task["files"]:
        path = Path(file["path"])
        try:
            if file["needs"] is None:
                LinearClassifier.load(path)
                continue
            with path.open("rb") as stream:
                report = check(stream, Kind(file["needs"]), _mapping(file), count_prompts=bool(task["trained"]))
            reports[file["field"]] = report
        except (DatasetError, BadClassifier) as error:
            return {"invalid": {"field": file["field"], "reason": str(error)}}
    repeats = {}
    for field, training_fields in task["trained"].items():
        trained = {prompt for name in training_fields if name in reports for prompt in reports[name].prompt_counts}
        repeats[field] = sum(rows for prompt, rows in reports[field].prompt_counts.items() if prompt in trained)
    return {"outlines": {field: asdict(report.outline()) for field, report in reports.items()}, "repeats": repeats}


def _count(folder: Path, _task: JsonObject) -> list[JsonObject]:
    """The counts in tokens that `tokens.json` in `folder` requests."""
    return count_folder(folder)


def _mapping(fields: JsonObject) -> Mapping | None:
    return None if fields["mapping"] is None else Mapping.model_validate(fields["mapping"])


TASKS: dict[str, Callable[[Path, JsonObject], object]] = {"survey": _survey, "check": _check, "count": _count}
