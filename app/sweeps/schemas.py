"""Sweeps on the wire."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from app.jobs.schemas import GateVerdict, shown_gates
from app.jobs.states import ACTIVE, Status
from app.jobs.tables import Job
from app.spec.json_types import JsonObject
from app.sweeps.frontier import ParetoPoint, pareto
from app.sweeps.tables import Sweep


class SweepEvaluation(BaseModel):
    """An evaluation of the model that a job of the sweep makes."""

    id: str
    status: Status
    metrics: dict[str, float] | None


class SweepJob(BaseModel):
    """A job of the grid, with its settings and results."""

    id: str
    settings: JsonObject
    """The value that it has for each field of the grid."""
    status: Status
    fine_tuned_model: str | None
    metrics: dict[str, float] | None
    evaluations: dict[str, SweepEvaluation]
    gates: list[GateVerdict]


class FrontierPoint(BaseModel):
    """A job's cost `x` and gain `y`. `temperature` is set if its evaluation has several temperatures."""

    job_id: str
    temperature: float | None
    x: float
    x_error: float | None
    y: float
    y_error: float | None
    pareto: bool
    """Whether it is in the Pareto set: no other point is at least as good in both metrics and better in one."""


class Frontier(BaseModel):
    """The jobs by two metrics. A job has no point until both are measured."""

    x: str
    y: str
    points: list[FrontierPoint]


class SweepObject(BaseModel):
    """A sweep: its jobs, and their comparison by two metrics."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "sweep-abc123",
                "object": "sweep",
                "created_at": 1730000000,
                "status": "running",
                "grid": {"beta": [0.05, 0.1]},
                "counts": {"succeeded": 1, "running": 1},
                "jobs": [{"id": "ftjob-abc123", "settings": {"beta": 0.05}, "status": "succeeded"}],
            }
        }
    )

    id: str
    object: Literal["sweep"] = "sweep"
    created_at: int
    name: str | None
    status: Literal["running", "succeeded", "failed", "cancelled"]
    """`running` until all jobs and evaluations have ended. Then `failed` if one failed, else `cancelled` if one was."""
    grid: dict[str, list[Any]]
    counts: dict[str, int]
    """The number of jobs in each status."""
    jobs: list[SweepJob]
    frontier: Frontier | None
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, sweep: Sweep, jobs: Sequence[Job], evaluations: Sequence[Job]) -> "SweepObject":
        """The API object of `sweep`, with its `jobs` and their `evaluations`."""
        by_id = {evaluation.id: evaluation for evaluation in evaluations}
        sweep_jobs = [
            SweepJob(
                id=job.id,
                settings=sweep.settings["jobs"][job.id],
                status=Status(job.status),
                fine_tuned_model=job.fine_tuned_model,
                metrics=job.metrics,
                evaluations={
                    name: SweepEvaluation(id=key, status=Status(by_id[key].status), metrics=by_id[key].metrics)
                    for name, key in (job.evaluations or {}).items()
                },
                gates=shown_gates(job),
            )
            for job in jobs
        ]
        states = [job.status for job in (*jobs, *evaluations)]
        counts = [str(job.status) for job in jobs]
        ended = next((state for state in (Status.FAILED, Status.CANCELLED) if state in states), Status.SUCCEEDED)
        return cls(
            id=sweep.id,
            created_at=int(sweep.created_at),
            name=sweep.name,
            status="running" if any(state in ACTIVE for state in states) else ended.value,
            grid=sweep.grid,
            counts={state: counts.count(state) for state in dict.fromkeys(counts)},
            jobs=sweep_jobs,
            frontier=_frontier(sweep.settings["frontier"], sweep_jobs),
            metadata=sweep.sweep_metadata,
        )

    def points(self) -> list[ParetoPoint]:
        """The points of the chart. Jobs with the same non-numeric grid values are one series."""
        jobs = {job.id: job for job in self.jobs}
        points = []
        for point in self.frontier.points if self.frontier else []:
            settings = jobs[point.job_id].settings
            words = [f"{name}={value}" for name, value in settings.items() if not isinstance(value, int | float)]
            suffix = "" if point.temperature is None else f" at temperature {point.temperature:g}"
            label = ", ".join(f"{name}={value}" for name, value in settings.items()) + suffix
            series = ", ".join(words) or "jobs"
            points.append(ParetoPoint(label, series, point.x, point.y, point.x_error, point.y_error))
        return points


def _error(metric: str) -> str:
    """The name of a metric's standard error."""
    name, at, temperature = metric.partition("@")
    return f"{name}/error{at}{temperature}"


def _frontier(axes: dict[str, str] | None, jobs: Sequence[SweepJob]) -> Frontier | None:
    """The points of the jobs that have both metrics of `axes`. A metric per temperature is named `METRIC@T`."""
    if axes is None:
        return None
    measured: list[tuple[str, float | None, float, float, float | None, float | None]] = []
    for job in jobs:
        metrics = dict(job.metrics or {})
        for name, evaluation in job.evaluations.items():
            metrics |= {f"evaluations/{name}/{metric}": value for metric, value in (evaluation.metrics or {}).items()}
        suffixes = ["", *(name.removeprefix(axes["x"]) for name in metrics if name.startswith(axes["x"] + "@"))]
        for suffix in suffixes:
            x, y = (metrics.get(axes[axis] + suffix) for axis in ("x", "y"))
            if x is not None and y is not None:
                x_error, y_error = (metrics.get(_error(axes[axis] + suffix)) for axis in ("x", "y"))
                measured.append((job.id, float(suffix[1:]) if suffix else None, x, y, x_error, y_error))
    best = pareto([(x, y) for _, _, x, y, _, _ in measured])
    points = [
        FrontierPoint(
            job_id=job_id, temperature=temperature, x=x, y=y, x_error=x_error, y_error=y_error, pareto=number in best
        )
        for number, (job_id, temperature, x, y, x_error, y_error) in enumerate(measured)
    ]
    return Frontier(x=axes["x"], y=axes["y"], points=points)
