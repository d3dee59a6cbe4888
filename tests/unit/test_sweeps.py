"""Sweeps: the jobs of a grid, and the Pareto frontier of their results."""

import csv
import io
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from app import svg
from app.spec.job import Adapter, JobSpec
from app.spec.json_types import JsonObject
from app.spec.sweep import MAX_JOBS, SweepSpec
from app.sweeps import frontier
from app.sweeps.frontier import ParetoPoint

JOB = {"model": "m", "training_file": "f", "method": {"type": "dpo"}}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25))
def test_the_pareto_set_holds_every_point_that_no_other_dominates(points: list[tuple[int, int]]) -> None:
    def dominated(k: int) -> bool:
        cost, gain = points[k]
        return any(
            (other_cost <= cost and other_gain >= gain) and (other_cost < cost or other_gain > gain)
            for other_cost, other_gain in points
        )

    pareto_set = frontier.pareto([(float(cost), float(gain)) for cost, gain in points])
    assert sorted(pareto_set) == [k for k in range(len(points)) if not dominated(k)]
    assert [points[k][0] for k in pareto_set] == sorted(points[k][0] for k in pareto_set)


def jobs_of(grid: JsonObject, job: JsonObject | None = None) -> list[tuple[JsonObject, JobSpec]]:
    spec = SweepSpec.model_validate({"job": job or JOB, "grid": grid})
    return [(values, JobSpec.model_validate(body)) for values, body in spec.bodies()]


def test_a_grid_gives_one_job_per_combination() -> None:
    jobs = jobs_of({"beta": [0.1, 0.5], "adapter.r": [4, 8, 16], "method.dpo.hyperparameters.loss": ["ipo"]})
    assert len(jobs) == 6 and len({str(values) for values, _ in jobs}) == 6
    for values, spec in jobs:
        assert spec.method.dpo is not None and not isinstance(spec.adapter, str | None)
        hyperparameters = spec.method.dpo.hyperparameters
        assert (hyperparameters.beta, spec.adapter.r, hyperparameters.loss) == tuple(values.values())
    assert len({spec.seed for _, spec in jobs}) == 1 and jobs[0][1].seed is not None, (
        "all jobs share a validation split"
    )
    assert {spec.seed for _, spec in jobs_of({"seed": [3, 4]})} == {3, 4}
    assert jobs_of({"beta": [1]}, JOB | {"seed": 9})[0][1].seed == 9
    assert "beta" not in str(JOB), "the given job is not modified"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "at least 1"),
        ({"beta": []}, "at least 1"),
        ({"beta": [0.1, 0.1]}, "has a value twice"),
        ({"beta": list(range(9)), "seed": list(range(8))}, f"at most {MAX_JOBS}"),
        ({"be ta": [1]}, "pattern"),
        ({"evaluations": [[{"judge": {"endpoint": {"api_key": "sk"}}}]]}, "cannot be swept"),
        ({"evaluations.0.beta": [1]}, "cannot be swept"),
        ({"training_file.name": [1]}, "holds no fields"),
        ({"beta": [0.1], "method.dpo.hyperparameters": [{"loss": "ipo"}]}, "which is swept too"),
        ({"adapter": [{"r": 4}], "adapter.alpha": [8]}, "which is swept too"),
        ({"beta": [0.1], "method.dpo.hyperparameters.beta": [0.2]}, "which is swept too"),
        ({"beta": [float("nan")]}, "JSON cannot represent"),
        ({"suffix": ["\ud800"]}, "JSON cannot represent"),
    ],
)
def test_an_invalid_grid_is_refused_with_the_reason(grid: JsonObject, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SweepSpec.model_validate({"job": JOB, "grid": grid})


@pytest.mark.parametrize("evaluations", [5, True, "held-out", {"name": "held-out"}, [5]])
def test_invalid_evaluations_are_left_for_the_job_to_refuse(evaluations: object) -> None:
    spec = SweepSpec.model_validate({"job": JOB | {"evaluations": evaluations}, "grid": {"beta": [0.1, 0.2]}})
    assert [body["evaluations"] for _, body in spec.bodies()] == [evaluations] * 2


def test_a_job_without_a_method_or_nested_too_deep_cannot_be_swept() -> None:
    with pytest.raises(ValidationError, match="names no 'method'"):
        SweepSpec.model_validate({"job": {"model": "m", "training_file": "f"}, "grid": {"beta": [0.1]}})
    nested: JsonObject = {}
    for _ in range(300):
        nested = {"metadata": nested}
    with pytest.raises(ValidationError, match="nested more than"):
        SweepSpec.model_validate({"job": JOB | nested, "grid": {"beta": [0.1]}})


def test_models_of_a_sweep_are_evaluated_on_the_same_prompts() -> None:
    evaluations = [
        {"name": "a", "type": "preference", "data": "d"},
        {"name": "b", "type": "preference", "data": "d", "seed": 5},
    ]
    specs = [spec for _, spec in jobs_of({"beta": [0.1, 0.2]}, JOB | {"evaluations": evaluations})]
    seeds = {tuple(evaluation.seed for evaluation in spec.evaluations or []) for spec in specs}
    assert seeds == {(specs[0].seed, 5)}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"x": "eval/loss", "y": "evaluations/e/accuracy"}, None),
        ({"x": "eval/loss", "y": "evaluations/e/accurac"}, "Did you mean 'evaluations/e/accuracy'"),
        ({"x": "evaluations/e/kl", "y": "eval/loss"}, "There is no metric 'evaluations/e/kl'"),
    ],
)
def test_the_axes_of_a_frontier_must_be_metrics_that_are_measured(axes: dict[str, str], message: str | None) -> None:
    job = JobSpec.model_validate(JOB | {"evaluations": [{"name": "e", "type": "preference", "data": "d"}]})
    spec = SweepSpec.model_validate({"job": JOB, "grid": {"beta": [1]}, "frontier": axes})
    if message is None:
        assert spec.axes(job) == spec.frontier
    else:
        with pytest.raises(PydanticCustomError, match=message):
            spec.axes(job)


def test_the_default_frontier_is_reward_against_kl_if_both_are_measured() -> None:
    judge = {"type": "classifier", "classifier": {"file": "c"}}
    evaluation = {"name": "e", "type": "reward_kl", "data": "d"}
    for evaluations, expected in (
        ([evaluation | {"judge": judge}], ("evaluations/e/kl", "evaluations/e/reward")),
        ([evaluation], None),
    ):
        job = JobSpec.model_validate(JOB | {"evaluations": evaluations})
        axes = SweepSpec.model_validate({"job": JOB, "grid": {"beta": [1]}}).axes(job)
        assert (axes and (axes.x, axes.y)) == expected


POINTS = [
    ParetoPoint("beta=1", "loss=<ipo>", 1.0, 0.5, 0.1, 0.02),
    ParetoPoint("beta=2", "loss=<ipo>", 2.0, 0.4),
    ParetoPoint("beta=3", "dpo & more", 3.0, 0.9, None, 0.05),
]


def test_the_picture_shows_every_point_and_marks_the_pareto_set() -> None:
    root = ElementTree.fromstring(frontier.svg(POINTS, "KL, nats", "reward", 'A "title" & <more>'))
    namespace = "{http://www.w3.org/2000/svg}"
    circles = [circle for circle in root.iter(f"{namespace}circle") if circle.find(f"{namespace}title") is not None]
    titles = [str(circle.findtext(f"{namespace}title")) for circle in circles]
    assert titles == ["beta=1: 1, 0.5", "beta=2: 2, 0.4", "beta=3: 3, 0.9"]
    assert [circle.get("stroke") is not None for circle in circles] == [True, False, True]
    x, y = ([float(str(circle.get(coordinate))) for circle in circles] for coordinate in ("cx", "cy"))
    assert x == sorted(x) and y[2] < y[0] < y[1], "a higher value is drawn further up"
    assert len({circle.get("fill") for circle in circles}) == 2
    ElementTree.fromstring(frontier.svg(POINTS, "\x00x", "y\x1b", "\x01 and \ufffe"))
    texts = "".join(root.itertext())
    assert all(text in texts for text in ("KL, nats", "reward", 'A "title" & <more>', "loss=<ipo>", "dpo & more"))
    frontier.svg([POINTS[0]], "x", "y")  # the range of a single point is empty


def test_the_csv_table_holds_the_same_points() -> None:
    rows = list(csv.DictReader(io.StringIO(frontier.as_csv(POINTS))))
    assert [(row["label"], row["x_error"], row["pareto"]) for row in rows] == [
        ("beta=1", "0.1", "1"), ("beta=2", "", "0"), ("beta=3", "", "1")
    ]  # fmt: skip


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_lie_inside_the_range(low: float, width: float) -> None:
    ticks = svg.ticks(low, low + width)
    assert 2 <= len(ticks) <= 13
    assert all(low - width * 1e-6 <= value <= low + width * (1 + 1e-6) for value in ticks)


def test_null_and_auto_are_the_default_in_a_sweep_too() -> None:
    evaluation = {"name": "held-out", "type": "preference", "data": "pairs", "seed": None}
    job = {"model": "base", "training_file": "pairs", "seed": "auto", "adapter": "auto", "evaluations": [evaluation]}
    spec = SweepSpec.model_validate(
        {"job": job | {"method": {"type": "dpo", "dpo": "auto"}}, "grid": {"adapter.r": [4, 8], "beta": [0.1]}}
    )
    bodies = [JobSpec.model_validate(body) for _, body in spec.bodies()]
    seeds = {seed for body in bodies for seed in (body.seed, *(each.seed for each in body.evaluations or []))}
    assert [body.adapter.r for body in bodies if isinstance(body.adapter, Adapter)] == [4, 8] and len(seeds) == 1
    with pytest.raises(ValidationError, match="has a value twice"):
        SweepSpec.model_validate({"job": job | {"method": {"type": "dpo"}}, "grid": {"beta": [None, "auto"]}})
