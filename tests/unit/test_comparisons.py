"""Scores from comparisons of every two answers, against the maximum likelihood of the Bradley–Terry model."""

from itertools import combinations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.spec.evaluation import Judge
from worker.answers import distinct, messages_of
from worker.comparisons import all_questions, label, points, scores

JUDGE = Judge.model_validate({"type": "model", "model": "judge"})
ANSWERS = ["short", "a longer one", "the longest of them all"]


def reply(question: str) -> str:
    """A judge that prefers longer answers."""
    _, _, rest = question.partition("Response A:\n")
    a, _, rest = rest.partition("\n\nResponse B:\n")
    return f"Preferred: {'A' if len(a) > len(rest.partition(chr(10))[0]) else 'B'}"


def test_every_two_answers_are_compared_in_both_orders() -> None:
    questions = all_questions(JUDGE, "p", ANSWERS)
    assert len(questions) == len(set(questions)) == 6
    found = label(JUDGE, "p", ANSWERS, iter([reply(question) for question in questions]))
    assert found == {"scores": [0.0, 0.5, 1.0], "verdicts": [["second"] * 2] * 3}


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["first", "first"], 1.0),
        (["first", "tie"], 1.0),
        (["second", "tie"], 0.0),
        (["first", "second"], 0.5),
        (["tie", "tie"], 0.5),
        (["first", None], None),
        ([None, None], None),
    ],
)
def test_one_is_preferred_if_it_is_named_and_the_other_is_not(
    verdicts: list[str | None], expected: float | None
) -> None:
    assert points(verdicts) == expected


def test_pairs_without_a_verdict_do_not_count() -> None:
    assert scores(3, [1.0, None, None]) == [1.0, 0.0, None]
    assert scores(2, [None]) == [None, None]


@given(st.data())
def test_the_order_is_that_of_the_bradley_terry_model(data: st.DataObject) -> None:
    """Each of K answers meets each other one, so the maximum likelihood orders them by their points (Ford 1957)."""
    count = data.draw(st.integers(2, 6))
    results = data.draw(
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=count * (count - 1) // 2, max_size=count * (count - 1) // 2)
    )
    values = scores(count, list(results))
    strengths = bradley_terry(count, results)
    for i, j in combinations(range(count), 2):
        first, second = values[i], values[j]
        assert first is not None and second is not None
        if first > second + 1e-9:
            assert strengths[i] > strengths[j]
        elif abs(first - second) < 1e-9:
            assert strengths[i] == pytest.approx(strengths[j], rel=1e-6)


def bradley_terry(count: int, results: list[float]) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]":
    """The strengths by the iteration of Hunter 2004, with a little prior so that they are finite."""
    wins = numpy.full((count, count), 0.1)
    numpy.fill_diagonal(wins, 0)
    for (i, j), result in zip(combinations(range(count), 2), results, strict=True):
        wins[i, j] += result
        wins[j, i] += 1 - result
    games, strengths = wins + wins.T, numpy.ones(count)
    for _ in range(3000):
        strengths = wins.sum(1) / (games / (strengths[:, None] + strengths[None, :])).sum(1)
        strengths /= strengths.sum()
    return strengths


def answer(writer: int, place: int, text: str | None) -> dict[str, object]:
    return {"writer": writer, "place": place, "text": text, "ended": True}


def test_equal_answers_count_once_and_empty_ones_not_at_all() -> None:
    answers = [
        answer(1, 0, "b"),
        answer(0, 1, " a"),
        answer(0, 0, "a "),
        answer(-1, 0, "c"),
        answer(1, 1, " "),
        answer(1, 2, None),
    ]
    item = distinct({"answers": answers})
    assert [(one["writer"], one["text"]) for one in item["answers"]] == [(-1, "c"), (0, "a "), (1, "b")]
    assert (item["repeated"], item["empty"], item["labels"]) == (1, 2, {})


def test_a_prompt_is_written_as_the_messages_of_the_api() -> None:
    assert messages_of({"prompt": "q", "system": "be kind"}) == [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "q"}
    ]  # fmt: skip
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "reasoning": "think", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]
    _, assistant, tool = messages_of({"prompt": turns})
    assert "reasoning" not in assistant and assistant["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert tool == turns[2]
