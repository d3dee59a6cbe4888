"""Figures of evaluations where the truth is known: what a judge likes is what its report shows."""

import random
from typing import Any

import numpy
import pytest
from sklearn.metrics import cohen_kappa_score

from app.spec.evaluation import EvaluationSpec, Price
from worker import evaluation_figures
from worker.judges.questions import verdicts

SIDES = ("candidate", "baseline")
WIN_RATE = EvaluationSpec.model_validate(
    {
        "type": "win_rate", "data": "-", "candidate": {"answers": "chosen"}, "baseline": {"answers": "rejected"},
        "judge": {"type": "endpoint", "endpoint": {"base_url": "https://judge.example/v1", "model": "m"}},
    }
)  # fmt: skip
AGREEMENT = EvaluationSpec.model_validate({"type": "agreement", "data": "-"})


def compared(count: int, judge: Any, seed: int = 0) -> list[dict[str, Any]]:
    """Items whose judge says `judge(candidate's length, baseline's length, generator)`: a letter for each order."""
    generator, items = random.Random(seed), []
    for number in range(count):
        lengths = generator.sample(range(1, 200), 2)
        said = [judge(*pair, generator) for pair in (lengths, lengths[::-1])]
        items.append(
            {
                "prompt_number": number, "temperature": None, "candidate_characters": lengths[0],
                "baseline_characters": lengths[1], "asked": True,
                "verdicts": verdicts([letter and f"Preferred: {letter}" for letter in said], SIDES),
            }
        )  # fmt: skip
    return items


def numbers(items: list[dict[str, Any]]) -> dict[str, float]:
    return evaluation_figures.flatten(evaluation_figures.report(WIN_RATE, items))


def test_a_judge_that_likes_length_is_exposed() -> None:
    found = evaluation_figures.report(WIN_RATE, compared(400, lambda a, b, _: "A" if a > b else "B"))["temperatures"][0]
    assert 0.4 < found["win_rate"]["value"] < 0.6, "nothing to see in the win rate"
    assert found["longer_answer_wins"]["value"] == 1.0
    assert [group["rate"]["value"] for group in found["by_length"]] == pytest.approx([0, 0, 0.5, 1, 1], abs=0.2)
    assert found["inconsistent"] == 0


def test_a_judge_that_likes_the_first_place_is_exposed_and_decides_nothing() -> None:
    found = numbers(compared(100, lambda *_: "A"))
    assert found["win_rate"] == 0.5 and found["ties"] == found["inconsistent"] == 100
    assert found["first_shown_preferred"] == 1.0


def test_answers_that_cannot_be_read_are_counted_and_left_out() -> None:
    def judge(a: int, _b: int, generator: random.Random) -> str | None:
        return None if generator.random() < 0.3 else "A"

    items = compared(200, judge)
    found, unread = numbers(items), sum(None in item["verdicts"] for item in items)
    assert found["unparseable"] == unread > 50 and found["comparisons"] == 200
    assert found["wins"] + found["ties"] + found["losses"] == 200 - unread
    assert "win_rate" not in numbers(compared(20, lambda *_: None))


def test_a_judge_that_only_guesses_finds_half_within_its_interval() -> None:
    hits = 0
    for seed in range(60):
        found = numbers(compared(120, lambda _a, _b, generator: generator.choice("AB"), seed))
        hits += found["win_rate/low"] <= 0.5 <= found["win_rate/high"]
    assert hits >= 52


def test_one_verdict_and_a_tie_is_a_preference() -> None:
    item = {"verdicts": ["candidate", "tie"]}
    assert evaluation_figures.preferred(item, SIDES) == 1.0
    assert evaluation_figures.preferred({"verdicts": ["candidate", "baseline"]}, SIDES) == 0.5
    assert evaluation_figures.preferred({"verdicts": ["baseline", "tie"]}, SIDES) == 0.0


def test_agreement_is_that_of_all_pairs_of_votes() -> None:
    generator = numpy.random.default_rng(4)
    items: list[dict[str, Any]] = []
    judge, people, pairs = list[int](), list[int](), list[tuple[int, int]]()
    for number in range(150):
        truth = generator.integers(2)
        votes = [int(truth if generator.random() < 0.8 else 1 - truth) for _ in range(int(generator.integers(1, 5)))]
        said = int(truth if generator.random() < 0.7 else 1 - truth)
        judge += [said] * len(votes)
        people += votes
        pairs += [(a, b) for k, a in enumerate(votes) for j, b in enumerate(votes) if k != j]
        items.append(
            {
                "prompt_number": number, "votes": [votes.count(0), votes.count(1)], "first_characters": 5,
                "second_characters": 9, "first_reward": float(1 - said), "second_reward": float(said),
            }
        )  # fmt: skip
    found = evaluation_figures.flatten(evaluation_figures.report(AGREEMENT, items))
    assert found["judge_people/agreement"] == pytest.approx(numpy.mean(numpy.array(judge) == people))
    assert found["judge_people/kappa"] == pytest.approx(cohen_kappa_score(judge, people))
    assert found["people_people/cases"] == len(pairs) / 2
    assert found["people_people/agreement"] == pytest.approx(numpy.mean([a == b for a, b in pairs]))
    assert found["people_people/kappa"] == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))
    assert found["judge_prefers_longer"] == pytest.approx(numpy.mean(judge)), "the second answer is the longer one"


def test_many_votes_are_counted_not_listed() -> None:
    """20,000 people on one pair are 400 million cases."""
    item = {"prompt_number": 0, "votes": [15_000, 5_000], "first_characters": 3, "second_characters": 1}
    found = evaluation_figures.flatten(
        evaluation_figures.report(AGREEMENT, [item, item | {"prompt_number": 1, "votes": [1, 0]}])
    )
    assert found["people_people/cases"] == 20_000 * 19_999 / 2
    assert found["people_people/agreement"] == pytest.approx((15e3 * 14_999 + 5e3 * 4_999) / (20e3 * 19_999))


def test_a_judges_ties_agree_with_nobody() -> None:
    item = {"prompt_number": 0, "votes": [2, 0], "first_characters": 1, "second_characters": 1}
    items = [item | {"first_reward": 1.0, "second_reward": 1.0}, item | {"first_reward": 1.0, "second_reward": 0.0}]
    found = evaluation_figures.flatten(evaluation_figures.report(AGREEMENT, items))
    assert found["judge_people/agreement"] == 0.5 and found["judge_people/without_ties/agreement"] == 1.0


def test_costs_are_counted_by_a_million_tokens() -> None:
    tokens = [(100, 20), (300, 40)]
    assert evaluation_figures.judge_usage(None, tokens) == {"answers": 2, "input_tokens": 400, "output_tokens": 60}
    assert evaluation_figures.judge_usage(Price(input=2.5, output=10), tokens)["cost"] == pytest.approx(0.0016)
