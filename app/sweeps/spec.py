"""The body of `POST /v1/sweeps`, and the jobs that it stands for. Pure pydantic."""

import copy
import itertools
import secrets
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.jobs.spec import JobSpec
from app.strict import NO_NUL, Metadata, Strict, inconsistent

MAX_JOBS = 64
Path = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[A-Za-z_]\w*(\.\w+)*$")]
Metric = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)]


class Axes(Strict):
    """The two metrics of the frontier: less of `x` is better, and more of `y`."""

    x: Metric
    y: Metric


class SweepSpec(Strict):
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

    job: dict[str, Any]
    """The body of a job, as `POST /v1/fine_tuning/jobs` takes it."""
    grid: Annotated[
        dict[Path, Annotated[list[Any], Field(min_length=1, max_length=MAX_JOBS)]], Field(min_length=1, max_length=16)
    ]
    """The values of each field. A name is a field of the job, dots lead into it (`adapter.r`), or one of its method's
    hyperparameters (`beta`). There is a job for each combination."""
    frontier: Axes | None = None
    """None: reward against KL, where an evaluation of the type `reward_kl` measures them."""
    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)] | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        count = 1
        for name, values in self.grid.items():
            count *= len(values)
            if any(value in values[:number] for number, value in enumerate(values)):
                raise inconsistent(f"grid.{name}", f"'{name}' has a value twice")
        if count > MAX_JOBS:
            raise inconsistent(
                "grid", f"The grid has {count} combinations; at most {MAX_JOBS} are trained in one sweep"
            )
        return self

    def bodies(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(the values, the body) of each job, in the order of the grid.

        All have one seed, unless it is swept: the same validation rows, and the same reference log-probs, which are
        then computed once.
        """
        seed = self.job.get("seed")
        shared = {"seed": secrets.randbelow(2**31)} if seed is None and "seed" not in self.grid else {}
        for values in itertools.product(*self.grid.values()):
            body, settings = copy.deepcopy(self.job) | shared, dict(zip(self.grid, values, strict=True))
            for path, value in settings.items():
                _set(body, path, value)
            yield settings, body

    def axes(self, first: JobSpec) -> Axes | None:
        """The metrics of the frontier; `first` is any of the jobs."""
        if self.frontier is not None:
            return self.frontier
        for evaluation in first.evaluations or []:
            if evaluation.type == "reward_kl" and evaluation.judge is not None:
                return Axes(x=f"evaluations/{evaluation.name}/kl", y=f"evaluations/{evaluation.name}/reward")
        return None


def _set(body: dict[str, Any], path: str, value: Any) -> None:
    if "." not in path and path not in JobSpec.model_fields:
        method = body.get("method")
        kind = method.get("type") if isinstance(method, dict) else None
        if kind is None:
            raise inconsistent(f"grid.{path}", f"'{path}' is no field of a job, and the job names no 'method'")
        path = f"method.{kind}.hyperparameters.{path}"
    *parents, last = path.split(".")
    target = body
    for name in parents:
        if target.get(name) is None:
            target[name] = {}
        target = target[name]
        if not isinstance(target, dict):
            raise inconsistent(f"grid.{path}", f"'{name}' holds no fields in this job")
    target[last] = value
