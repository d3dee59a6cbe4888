"""Exports of Label Studio and Argilla as preference data."""

import io
import json
from typing import Any

import pytest

from app.spec.datasets.check import examples, survey
from app.spec.datasets.errors import DatasetError

TASK: dict[str, Any] = {"id": 7, "data": {"prompt": "q", "answer1": "one", "answer2": "two"}}


def vote(selected: str, to_name: Any = ("answer1", "answer2"), **fields: Any) -> dict[str, Any]:
    result = {"type": "pairwise", "from_name": "comparison", "to_name": to_name, "value": {"selected": selected}}
    return {"result": [result], **fields}


def read(record: dict[str, Any]) -> tuple[object, ...]:
    (example,) = examples(io.BytesIO(json.dumps([record]).encode()))
    return example.responses


def dropped(record: dict[str, Any]) -> dict[str, int]:
    return dict(survey(io.BytesIO(json.dumps([record]).encode())).dropped)


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ([vote("left")], ("one", "two")),
        ([vote("right")], ("two", "one")),
        ([vote("left", "answer1,answer2")], ("one", "two")),
        ([vote("left", ["answer2", "answer1"])], ("two", "one")),
        ([vote("left"), vote("right"), vote("right")], ("two", "one")),
        ([vote("left"), vote("right", was_cancelled=True)], ("one", "two")),
    ],
)
def test_the_votes_of_a_task_decide(annotations: list[dict[str, Any]], expected: tuple[str, str]) -> None:
    assert read(TASK | {"annotations": annotations}) == expected


def test_a_task_without_a_majority_or_a_vote_is_dropped_and_counted() -> None:
    assert dropped(TASK | {"annotations": [vote("left"), vote("right")]}) == {"tie": 1}
    assert dropped(TASK | {"annotations": []}) == {"no_verdict": 1}
    assert dropped(TASK | {"annotations": [vote("left", was_cancelled=True)]}) == {"no_verdict": 1}


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (TASK | {"annotations": [vote("middle")]}, "annotations"),
        (TASK | {"annotations": [1]}, "annotations"),
        ({"data": {"prompt": "q", "answer1": "one"}, "annotations": [vote("left")]}, "data"),
        ({"data": {"answer1": "one", "answer2": "two"}, "annotations": [vote("left")]}, "data"),
    ],
)
def test_a_task_that_cannot_be_understood_is_refused_with_its_field(record: dict[str, Any], field: str) -> None:
    with pytest.raises(DatasetError, match=field):
        read(record)


RECORD: dict[str, Any] = {"id": "1", "prompt": "q", "response_1": "a", "response_2": "b", "response_3": "c"}


def ranked(*rankings: str, statuses: list[str | None] | None = None) -> dict[str, Any]:
    names = [[f"response_{place}" for place in ranking] for ranking in rankings]
    return RECORD | {"ranking.responses": names, "ranking.responses.status": statuses or ["submitted"] * len(rankings)}


def test_rankings_give_the_mean_order() -> None:
    assert read(ranked("312")) == ("c", "a", "b")
    assert read(ranked("312", "132", "132")) == ("a", "c", "b")
    assert read(ranked("312", "123", statuses=["draft", "submitted"])) == ("a", "b", "c"), "a draft does not count"
    assert read(ranked("213", statuses=[None])) == ("b", "a", "c")
    (example,) = examples(io.BytesIO(json.dumps([ranked("312", "132")]).encode()))
    assert example.scores == pytest.approx((0.75, 0.0))
    assert example.responses == ("a", "b"), "equal scores: the first stays"


def test_records_without_a_submitted_ranking_are_dropped_and_counted() -> None:
    rows = [ranked("312"), ranked("123", statuses=["draft"]), RECORD | {"ranking.responses": None}]
    report = survey(io.BytesIO(json.dumps(rows).encode()))
    assert report.kept == 1 and dict(report.dropped) == {"no_verdict": 2} and report.format == "argilla"
    assert set(report.unread) == {"id"}


def test_a_ranking_of_other_columns_is_refused() -> None:
    rows = [ranked("312"), ranked("12")]
    report = survey(io.BytesIO(json.dumps(rows).encode()))
    assert report.error is not None and report.error["field"] == "ranking.responses"


def test_columns_of_other_tools_beside_pairs_change_nothing() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for more in (
        {"data": {"source": "x"}, "annotations": []},
        {"ranking.responses": [["rejected", "chosen"]], "ranking.responses.status": ["draft"]},
    ):
        assert read(pair | more) == ("a", "b")
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert read(chat | {"data": {"source": "x"}, "annotations": []}) == ("a",)
