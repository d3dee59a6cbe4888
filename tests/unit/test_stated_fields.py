"""The tables of fields in the docs: every field is there, with its default and its bounds."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel

from app.spec.evaluation import Endpoint, EvaluationSpec, Judge, SamplingSpec
from app.spec.hyperparameters import (
    DPOHyperparameters,
    EarlyStopping,
    Hyperparameters,
    ReinforcementHyperparameters,
    SupervisedHyperparameters,
    SyncReference,
)
from app.spec.job import Adapter, JobSpec, SftStage
from app.spec.labelling import Labeller, LabellingSpec, People, Writer
from app.spec.pipeline import PipelineSpec
from app.spec.resources import DeviceRange, Parallel, Resources
from app.spec.sweep import SweepSpec

DOCS = Path(__file__).parents[2] / "docs"
MODELS: dict[str, dict[str, list[type[BaseModel]]]] = {
    "jobs.md": {
        "Model and data": [JobSpec],
        "Stages": [JobSpec, SftStage],
        "Adapter": [Adapter],
        "Precision": [JobSpec],
        "Devices": [Resources, Parallel, DeviceRange],
        "Text": [JobSpec],
        "Name, queue and limits": [JobSpec],
        "Evaluations and gates": [JobSpec],
        "Data and steps": [Hyperparameters],
        "Optimizer": [Hyperparameters],
        "Validation, checkpoints and early stopping": [Hyperparameters, EarlyStopping],
        "Speed and memory": [Hyperparameters],
        "SFT stage only": [SupervisedHyperparameters],
        "Preference stage only": [DPOHyperparameters],
        "The reference": [SyncReference],
    },
    "reinforcement.md": {"Hyperparameters": [ReinforcementHyperparameters]},
    "evaluations.md": {
        "Fields": [EvaluationSpec, Resources],
        "Sampling": [SamplingSpec],
        "Questions": [Judge],
        "A judge behind an endpoint": [Endpoint],
        "Sweeps": [SweepSpec],
    },
    "labellings.md": {
        "Fields": [LabellingSpec, Resources],
        "Writers": [Writer],
        "Labellers": [Labeller],
        "People": [People],
    },
    "pipelines.md": {"Fields": [PipelineSpec]},
}
"""The models whose fields the tables of a section list."""
PREFIXES: dict[type[BaseModel], str] = {
    Adapter: "adapter.",
    SftStage: "sft.",
    Resources: "resources.",
    Parallel: "parallel.",
    DeviceRange: "resources.gpus.",
    People: "people.",
}
"""Where the fields of a model are in the body, if not at its top."""
RESOLVED = JobSpec.model_validate(
    {"model": "base", "training_file": "pairs", "sft": {}, "method": {"type": "dpo"}}
).resolved()
WRITTEN_OUT: dict[type[BaseModel], dict[str, Any]] = {
    Hyperparameters: RESOLVED.method.hyperparameters.model_dump(),
    JobSpec: {"validation_split": RESOLVED.validation_split},
    EvaluationSpec: {"priority": 0},
}
"""Defaults that `resolved` fills in."""
ELSEWHERE = ("validation_split", "learning_rate")
"""Fields whose defaults `docs/generate/numbers.py` writes."""
LITERAL = re.compile(r"`([^`]+)`|(-?[\d.,e-]+)")


class Row(NamedTuple):
    """A field of a table."""

    section: str
    name: str
    default: str
    meaning: str


def rows(page: str) -> Iterator[Row]:
    """The rows of all tables that list fields with their defaults."""
    section, listing = "", False
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|"):
            listing = False
        elif len(cells) == 3 and cells[0].startswith("field") and cells[1].startswith("default"):
            listing = True
        elif listing and not line.startswith("|---"):
            names = re.findall(r"`([\w.]+)`", cells[0])
            defaults = cells[1].split(", ") if len(names) == len(cells[1].split(", ")) > 1 else [cells[1]] * len(names)
            for name, default in zip(names, defaults, strict=True):
                yield Row(section, name, default, cells[2])


def field_of(page: str, row: Row) -> tuple[type[BaseModel], str] | None:
    """(model, field) that a row is about; None for a path into a nested object that another table lists."""
    for model in MODELS[page].get(row.section, []):
        prefixes = ("adapter.", "sft.", "resources.", "parallel.", "people.")
        name = row.name.rpartition(".")[2] if row.name.startswith(prefixes) else row.name
        if name in model.model_fields and (model is not JobSpec or not row.name.startswith("sft.")):
            return model, name
    return None


ROWS = [(page, row) for page in MODELS for row in rows(page) if row.section in MODELS[page]]


@pytest.mark.parametrize(("page", "row"), ROWS, ids=[f"{page}-{row.section}-{row.name}" for page, row in ROWS])
def test_a_field_has_the_stated_default_and_bounds(page: str, row: Row) -> None:
    found = field_of(page, row)
    if found is None:
        assert row.name.startswith("method.") or row.default == "the loss's own", "the table names no field"
        return
    model, name = found
    field = model.model_fields[name]
    default = WRITTEN_OUT.get(model, {}).get(name, field.default)
    literal = LITERAL.fullmatch(row.default)
    if field.is_required():
        assert row.default.startswith("required")
    elif literal is not None and default is None:
        stated = literal[1] or literal[2]
        assert name == "fold_system" or re.search(rf"default is `?{re.escape(stated)}\b", field.description or "")
    elif literal is not None:
        stated = (literal[1] or literal[2]).replace(",", "") if literal[2] else literal[1]
        assert stated == default if isinstance(default, str) else json.loads(stated) == default
    else:
        plain = isinstance(default, int | float | str)
        assert not plain or name in ELSEWHERE, "the default is not stated"
    schema = json.dumps(model.model_json_schema()["properties"][name])
    stated_bounds = re.findall(r"(?<![\w.])([−\d.,]+) to ([\d.,]*\d)", row.meaning)
    if name != "suffix":  # its pattern has the length
        stated_bounds += [(most,) for most in re.findall(r"\b[Uu]p to (\d[\d,]*)", row.meaning)]
    for given in stated_bounds:
        bounds = [float(bound.replace(",", "").replace("−", "-")) for bound in given]
        limits = {
            float(value) for value in re.findall(r'"(?:exclusive)?(?:min|max)[a-zA-Z]*": ([-\d.e+]+)', schema, re.I)
        }
        assert limits.issuperset(bounds), (bounds, schema)


@pytest.mark.parametrize("page", MODELS)
def test_every_field_is_in_a_table(page: str) -> None:
    cells = re.findall(r"^\| (`[^|]*?) \|", (DOCS / page).read_text(), flags=re.MULTILINE)
    listed = {name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)}
    listed |= {name.partition(".")[0] for name in listed}  # `method.type` stands for `method`
    for model in {model for models in MODELS[page].values() for model in models}:
        prefix = PREFIXES.get(model, "")
        shared = set() if model is Hyperparameters else Hyperparameters.model_fields.keys()  # jobs.md lists them
        assert [name for name in model.model_fields if f"{prefix}{name}" not in listed | shared] == [], model
