"""The pairs that a row with ranked answers gives, by each rule."""

import pickle
from collections import Counter
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.spec.datasets.check import examples
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example
from app.spec.datasets.pairs import PairRule, Rule
from app.spec.hyperparameters import DPOHyperparameters
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject


def pairs(example: Example, rule: Rule, min_margin: float | None = None) -> list[tuple[object, ...]]:
    return [pair.responses for pair in PairRule(rule, min_margin).pairs(example)]


def read(tmp_path: Path, row: JsonObject) -> Example:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(orjson.dumps(row) + b"\n")
    with path.open("rb") as file:
        (example,) = examples(file)
    return example


SCORED: JsonObject = {"prompt": "q", "responses": ["c", "a", "b"], "scores": [1.0, 4.0, 2.5]}


def test_each_rule_takes_its_pairs_of_a_scored_row(tmp_path: Path) -> None:
    example = read(tmp_path, SCORED)
    assert pairs(example, "all") == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs(example, "best_worst") == [("a", "c")]
    assert pairs(example, "best_random") in ([("a", "b")], [("a", "c")])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (SCORED, [("a", "b"), ("a", "c"), ("b", "c")]),
        ({"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 2, 4]}, [("a", "c"), ("b", "c")]),
        (
            {"prompt": "q", "responses": [{"text": "a", "score": 9}, {"text": "b", "score": 8}]},
            [],
        ),
    ],
)
def test_a_margin_compares_scores_and_ranks(tmp_path: Path, row: JsonObject, expected: list[tuple[str, str]]) -> None:
    assert pairs(read(tmp_path, row), "all", 1.5) == expected


def test_a_margin_needs_scores_and_an_error_names_the_line(tmp_path: Path) -> None:
    example = read(tmp_path, {"prompt": "q", "responses": ["a", "b"]})
    with pytest.raises(DatasetError, match=r"(?i)line 1.*scores.*min_margin"):
        pairs(example, "all", 0.0)


@given(st.lists(st.text(min_size=1), min_size=2, max_size=9, unique=True))
def test_a_random_pair_has_the_best_answer_and_is_always_the_same(answers: list[str]) -> None:
    example = Example(1, "q", tuple(answers))
    ((better, worse),) = pairs(example, "best_random")
    assert better == answers[0]
    assert worse in answers[1:]
    assert pairs(example, "best_random") == [(better, worse)]


def test_a_random_pair_takes_each_other_answer_about_equally_often() -> None:
    drawn = Counter(
        pair[1]
        for number in range(3000)
        for pair in pairs(Example(1, f"q{number}", ("a", "b", "c", "d")), "best_random")
    )
    assert set(drawn) == {"b", "c", "d"}
    # 3,000 draws with probability 1/3: five standard deviations are 129.
    assert all(abs(count - 1000) < 129 for count in drawn.values())


@pytest.mark.parametrize("loss", ["plackett_luce", "kto"])
def test_losses_on_whole_rows_refuse_a_rule_for_pairs(loss: str) -> None:
    for setting in ({"pairs": "best_worst"}, {"min_margin": 1.0}):
        with pytest.raises(ValidationError, match="whole rows"):
            DPOHyperparameters.model_validate({"loss": loss, **setting})


def test_a_stored_spec_has_the_rule_only_if_it_was_set() -> None:
    body = {"model": "m", "training_file": "f", "method": {"type": "dpo"}}
    plain = JobSpec.model_validate(body).to_store()["method"]["dpo"]
    assert plain is None or "pairs" not in plain["hyperparameters"]
    body["method"] = {"type": "dpo", "dpo": {"hyperparameters": {"pairs": "best_worst", "min_margin": 2}}}
    stored = JobSpec.model_validate(body).to_store()
    assert stored["method"]["dpo"]["hyperparameters"]["pairs"] == "best_worst"
    rule = JobSpec.stored(stored).stages()[-1].settings.pair_rule
    assert rule == PairRule("best_worst", 2.0)


def test_an_error_of_a_row_survives_the_way_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(DatasetError(3, "scores", "is missing", {"prompt": "q"})))
    assert (error.line, error.field, error.reason, error.mapping) == (3, "scores", "is missing", {"prompt": "q"})
    assert str(error) == "Line 3: field 'scores': is missing"
