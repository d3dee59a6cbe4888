"""Grids and frontiers: which jobs a sweep stands for, and which of them nothing beats."""

import csv
import io
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from app import svg
from app.spec.job import JobSpec
from app.spec.sweep import MAX_JOBS, SweepSpec
from app.sweeps import frontier
from app.sweeps.frontier import ParetoPoint

JOB = {"model": "m", "training_file": "f", "method": {"type": "dpo"}}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25))
def test_the_pareto_set_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    def beaten(k: int) -> bool:
        cost, gain = points[k]
        return any((c <= cost and g >= gain) and (c < cost or g > gain) for c, g in points)

    found = frontier.pareto([(float(c), float(g)) for c, g in points])
    assert sorted(found) == [k for k in range(len(points)) if not beaten(k)]
    assert [points[k][0] for k in found] == sorted(points[k][0] for k in found)


def bodies(grid: dict[str, Any], job: dict[str, Any] | None = None) -> list[tuple[dict[str, Any], JobSpec]]:
    spec = SweepSpec.model_validate({"job": job or JOB, "grid": grid})
    return [(values, JobSpec.model_validate(body)) for values, body in spec.bodies()]


def test_a_job_for_each_combination() -> None:
    found = bodies({"beta": [0.1, 0.5], "adapter.r": [4, 8, 16], "method.dpo.hyperparameters.loss": ["ipo"]})
    assert len(found) == 6 and len({str(values) for values, _ in found}) == 6
    for values, spec in found:
        assert spec.method.dpo is not None and not isinstance(spec.adapter, str | None)
        settings = spec.method.dpo.hyperparameters
        assert (settings.beta, spec.adapter.r, settings.loss) == tuple(values.values())
    assert len({spec.seed for _, spec in found}) == 1 and found[0][1].seed is not None, "they share a validation split"
    assert {spec.seed for _, spec in bodies({"seed": [3, 4]})} == {3, 4}
    assert bodies({"beta": [1]}, JOB | {"seed": 9})[0][1].seed == 9
    assert "beta" not in str(JOB), "what was given stays as it is"


@pytest.mark.parametrize(
    ("grid", "said"),
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
def test_grids_that_are_none_are_refused(grid: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SweepSpec.model_validate({"job": JOB, "grid": grid})


@pytest.mark.parametrize("evaluations", [5, True, "held-out", {"name": "held-out"}, [5]])
def test_what_is_no_list_of_evaluations_is_left_to_the_job_to_refuse(evaluations: Any) -> None:
    spec = SweepSpec.model_validate({"job": JOB | {"evaluations": evaluations}, "grid": {"beta": [0.1, 0.2]}})
    assert [body["evaluations"] for _, body in spec.bodies()] == [evaluations] * 2


def test_a_grid_needs_to_know_the_method_of_its_hyperparameters() -> None:
    with pytest.raises(ValidationError, match="names no 'method'"):
        SweepSpec.model_validate({"job": {"model": "m", "training_file": "f"}, "grid": {"beta": [0.1]}})
    nested: dict[str, Any] = {}
    for _ in range(300):
        nested = {"metadata": nested}
    with pytest.raises(ValidationError, match="nested more than"):
        SweepSpec.model_validate({"job": JOB | nested, "grid": {"beta": [0.1]}})


def test_models_of_a_sweep_are_evaluated_on_the_same_prompts() -> None:
    evaluations = [
        {"name": "a", "type": "preference", "data": "d"},
        {"name": "b", "type": "preference", "data": "d", "seed": 5},
    ]
    found = [spec for _, spec in bodies({"beta": [0.1, 0.2]}, JOB | {"evaluations": evaluations})]
    seeds = {tuple(one.seed for one in spec.evaluations or []) for spec in found}
    assert seeds == {(found[0].seed, 5)}


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"x": "eval/loss", "y": "evaluations/e/accuracy"}, None),
        ({"x": "eval/loss", "y": "evaluations/e/accurac"}, "Did you mean 'evaluations/e/accuracy'"),
        ({"x": "evaluations/e/kl", "y": "eval/loss"}, "There is no metric 'evaluations/e/kl'"),
    ],
)
def test_axes_are_metrics_that_will_be_measured(axes: dict[str, str], said: str | None) -> None:
    job = JobSpec.model_validate(JOB | {"evaluations": [{"name": "e", "type": "preference", "data": "d"}]})
    spec = SweepSpec.model_validate({"job": JOB, "grid": {"beta": [1]}, "frontier": axes})
    if said is None:
        assert spec.axes(job) == spec.frontier
    else:
        with pytest.raises(PydanticCustomError, match=said):
            spec.axes(job)


def test_the_frontier_is_reward_against_kl_where_that_is_measured() -> None:
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
    name = "{http://www.w3.org/2000/svg}"
    circles = [circle for circle in root.iter(f"{name}circle") if circle.find(f"{name}title") is not None]
    titles = [str(circle.findtext(f"{name}title")) for circle in circles]
    assert titles == ["beta=1: 1, 0.5", "beta=2: 2, 0.4", "beta=3: 3, 0.9"]
    assert [circle.get("stroke") is not None for circle in circles] == [True, False, True]
    x, y = ([float(str(circle.get(at))) for circle in circles] for at in ("cx", "cy"))
    assert x == sorted(x) and y[2] < y[0] < y[1], "up is more"
    assert len({circle.get("fill") for circle in circles}) == 2
    ElementTree.fromstring(frontier.svg(POINTS, "\x00x", "y\x1b", "\x01 and \ufffe"))
    texts = "".join(root.itertext())
    assert all(text in texts for text in ("KL, nats", "reward", 'A "title" & <more>', "loss=<ipo>", "dpo & more"))
    frontier.svg([POINTS[0]], "x", "y")  # a range of nothing


def test_the_table_has_the_same() -> None:
    rows = list(csv.DictReader(io.StringIO(frontier.as_csv(POINTS))))
    assert [(row["label"], row["x_error"], row["pareto"]) for row in rows] == [
        ("beta=1", "0.1", "1"), ("beta=2", "", "0"), ("beta=3", "", "1")
    ]  # fmt: skip


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    found = svg.ticks(low, low + width)
    assert 2 <= len(found) <= 13
    assert all(low - width * 1e-6 <= value <= low + width * (1 + 1e-6) for value in found)
