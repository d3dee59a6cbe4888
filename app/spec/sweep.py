"""The sweep spec: the body of `POST /v1/sweeps`, and the bodies of its jobs. This module is pure pydantic."""

import copy
import itertools
import secrets
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.spec.job import METHODS, JobSpec
from app.spec.json_types import JsonObject
from app.spec.metrics import METRICS
from app.spec.quality_gates import require_metric
from app.spec.schema_base import NO_NUL, Defaulted, Metadata, Strict, inconsistent, plain_json

MAX_JOBS = 64
MAX_SWEEP_BYTES = 1 << 20
NOT_SWEPT = ("evaluations", "gates", "integrations", "metadata")
"""Fields that cannot be swept: they do not affect the trained model. Evaluations also hold API keys of judges."""
FieldPath = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[A-Za-z_]\w*(\.\w+)*$")]
MetricName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)]


class Axes(Strict):
    """The two metrics of the frontier. Lower is better for `x`, higher for `y`."""

    x: MetricName
    y: MetricName


class SweepSpec(Defaulted):
    """The body of `POST /v1/sweeps`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "job": {
                    "model": "meta-llama/Llama-3.1-8B",
                    "training_file": "file-abc123",
                    "method": {"type": "dpo"},
                    "evaluations": [{"name": "held-out", "type": "preference", "data": "file-def456"}],
                },
                "grid": {"beta": [0.05, 0.1, 1.0], "learning_rate": [1e-5, 5e-5]},
            }
        }
    )

    job: JsonObject
    """The body of a job, as `POST /v1/fine_tuning/jobs` takes it."""
    grid: Annotated[
        dict[FieldPath, Annotated[list[Any], Field(min_length=1, max_length=MAX_JOBS)]],
        Field(min_length=1, max_length=16),
    ]
    """The values to try for each field; there is a job for each combination. A name is a field of the job (with dots
    for nested fields: `adapter.r`), or a hyperparameter of its method (`beta`)."""
    frontier: Axes | None = None
    """The default is reward against KL, if an evaluation of the type `reward_kl` measures both."""
    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)] | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _grid_is_valid(self) -> Self:
        """Check that each name of the grid is a field of the job, and that no two names overlap."""
        plain_json(self.job, "job", MAX_SWEEP_BYTES)
        plain_json(self.grid, "grid", MAX_SWEEP_BYTES)
        count = 1
        for name, values in self.grid.items():
            count *= len(values)
            written = [None if value in JobSpec.UNSET else value for value in values]
            if any(value in written[:number] for number, value in enumerate(written)):
                raise inconsistent(f"grid.{name}", f"'{name}' has a value twice")
        if count > MAX_JOBS:
            raise inconsistent("grid", f"The grid has {count} combinations; at most {MAX_JOBS} are one sweep")
        places = {name: self._place(name) for name in self.grid}
        for name, place in places.items():
            if place.partition(".")[0] in NOT_SWEPT:
                raise inconsistent(f"grid.{name}", f"'{place}' cannot be swept")
            for other, other_place in places.items():
                if other != name and f"{other_place}.".startswith(f"{place}."):
                    raise inconsistent(f"grid.{other}", f"'{other}' is in '{name}', which is swept too")
        for _ in self.bodies():
            pass
        return self

    def _place(self, name: str) -> str:
        """The path in the job body that a name of the grid stands for."""
        if "." in name or name in JobSpec.model_fields:
            return name
        method = self.job.get("method")
        method_type = method.get("type") if isinstance(method, dict) else None
        if method_type not in METHODS:
            raise inconsistent(f"grid.{name}", f"'{name}' is no field of a job, and the job names no 'method'")
        return f"method.{method_type}.hyperparameters.{name}"

    def bodies(self) -> Iterator[tuple[JsonObject, JsonObject]]:
        """(the swept values, the body) of each job, in the order of the grid.

        All jobs and their evaluations share one seed, unless it is swept. They then share the validation rows, the
        prompts of the completions, and the reference log-probs, which are computed only once.
        """
        seed = self.job.get("seed")
        shared = secrets.randbelow(2**31) if seed in JobSpec.UNSET else seed
        for values in itertools.product(*self.grid.values()):
            body, swept = copy.deepcopy(self.job), dict(zip(self.grid, values, strict=True))
            body["seed"] = shared
            evaluations = body.get("evaluations")
            for evaluation in evaluations if isinstance(evaluations, list) else []:
                if isinstance(evaluation, dict) and evaluation.get("seed") is None:
                    evaluation["seed"] = shared
            for name, value in swept.items():
                _set(body, self._place(name), copy.deepcopy(value), f"grid.{name}")
            yield swept, body

    def axes(self, first: JobSpec) -> Axes | None:
        """The metrics of the frontier. `first` is the spec of any job of the sweep.

        Raises `PydanticCustomError` for a metric that will not be measured.
        """
        if self.frontier is None:
            for evaluation in first.evaluations or []:
                if evaluation.type == "reward_kl" and evaluation.judge is not None:
                    return Axes(x=f"evaluations/{evaluation.name}/kl", y=f"evaluations/{evaluation.name}/reward")
            return None
        measured = list(METRICS)
        for evaluation in first.evaluations or []:
            names = evaluation.figures()
            names += [name.partition("@")[0] for name in names]  # the same metric over all temperatures
            measured += [f"evaluations/{evaluation.name}/{name}" for name in names]
        for axis in ("x", "y"):
            require_metric(getattr(self.frontier, axis), measured, f"frontier.{axis}")
        return self.frontier


def _set(body: JsonObject, place: str, value: object, field: str) -> None:
    """Set the value at the dotted path `place`. `field` names the grid's entry in an error."""
    *parents, last = place.split(".")
    target = body
    for name in parents:
        if target.get(name) in JobSpec.UNSET:
            target[name] = {}
        target = target[name]
        if not isinstance(target, dict):
            raise inconsistent(field, f"'{name}' holds no fields in this job")
    target[last] = value
