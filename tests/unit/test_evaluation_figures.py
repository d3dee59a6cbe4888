"""Figures of evaluations by judges whose preferences are known."""

import random
from collections.abc import Callable

import numpy
import pytest
from sklearn.metrics import cohen_kappa_score

from app.spec.evaluation import EvaluationSpec, Price
from app.spec.json_types import JsonObject
from worker import evaluation_figures
from worker.judge import verdicts

Judge = Callable[[int, int, random.Random], str | None]
SIDES = ("candidate", "baseline")
WIN_RATE = EvaluationSpec.model_validate(
    {
        "type": "win_rate", "data": "-", "candidate": {"answers": "chosen"}, "baseline": {"answers": "rejected"},
        "judge": {"type": "endpoint", "endpoint": {"base_url": "https://judge.example/v1", "model": "m"}},
    }
)  # fmt: skip
AGREEMENT = EvaluationSpec.model_validate({"type": "agreement", "data": "-"})


def comparisons(count: int, judge: Judge, seed: int = 0) -> list[JsonObject]:
    """Items judged in both orders. `judge` maps the lengths of answers A and B, and a generator, to a letter."""
    generator, items = random.Random(seed), []
    for number in range(count):
        lengths = generator.sample(range(1, 200), 2)
        letters = [judge(first, second, generator) for first, second in (lengths, lengths[::-1])]
        items.append(
            {
                "prompt_number": number, "temperature": None, "candidate_characters": lengths[0],
                "baseline_characters": lengths[1], "asked": True,
                "verdicts": verdicts([letter and f"Preferred: {letter}" for letter in letters], SIDES),
            }
        )  # fmt: skip
    return items


def metrics_of(items: list[JsonObject]) -> dict[str, float]:
    return evaluation_figures.flatten(evaluation_figures.report(WIN_RATE, items))


def test_a_judge_that_prefers_length_is_exposed() -> None:
    figures = evaluation_figures.report(
        WIN_RATE, comparisons(400, lambda length_a, length_b, _: "A" if length_a > length_b else "B")
    )["temperatures"][0]
    assert 0.4 < figures["win_rate"]["value"] < 0.6, "the win rate does not show it"
    assert figures["longer_answer_wins"]["value"] == 1.0
    assert [group["rate"]["value"] for group in figures["by_length"]] == pytest.approx([0, 0, 0.5, 1, 1], abs=0.2)
    assert figures["inconsistent"] == 0


def test_a_judge_that_prefers_the_first_place_is_exposed_and_decides_nothing() -> None:
    metrics = metrics_of(comparisons(100, lambda *_: "A"))
    assert metrics["win_rate"] == 0.5 and metrics["ties"] == metrics["inconsistent"] == 100
    assert metrics["first_shown_preferred"] == 1.0


def test_unparseable_answers_are_counted_and_left_out() -> None:
    def judge(_a: int, _b: int, generator: random.Random) -> str | None:
        return None if generator.random() < 0.3 else "A"

    items = comparisons(200, judge)
    metrics, unparseable = metrics_of(items), sum(None in item["verdicts"] for item in items)
    assert metrics["unparseable"] == unparseable > 50 and metrics["comparisons"] == 200
    assert metrics["wins"] + metrics["ties"] + metrics["losses"] == 200 - unparseable
    assert "win_rate" not in metrics_of(comparisons(20, lambda *_: None))


def test_the_interval_of_a_guessing_judge_contains_one_half() -> None:
    hits = 0
    for seed in range(60):
        metrics = metrics_of(comparisons(120, lambda _a, _b, generator: generator.choice("AB"), seed))
        hits += metrics["win_rate/low"] <= 0.5 <= metrics["win_rate/high"]
    assert hits >= 52


def test_a_verdict_and_a_tie_count_as_a_preference() -> None:
    item = {"verdicts": ["candidate", "tie"]}
    assert evaluation_figures.preferred(item, SIDES) == 1.0
    assert evaluation_figures.preferred({"verdicts": ["candidate", "baseline"]}, SIDES) == 0.5
    assert evaluation_figures.preferred({"verdicts": ["baseline", "tie"]}, SIDES) == 0.0


def test_agreement_is_computed_over_all_pairs_of_votes() -> None:
    generator = numpy.random.default_rng(4)
    items: list[JsonObject] = []
    judge_votes, human_votes, pairs = list[int](), list[int](), list[tuple[int, int]]()
    for number in range(150):
        truth = generator.integers(2)
        votes = [int(truth if generator.random() < 0.8 else 1 - truth) for _ in range(int(generator.integers(1, 5)))]
        judge_vote = int(truth if generator.random() < 0.7 else 1 - truth)
        judge_votes += [judge_vote] * len(votes)
        human_votes += votes
        pairs += [(first, second) for k, first in enumerate(votes) for j, second in enumerate(votes) if k != j]
        items.append(
            {
                "prompt_number": number, "votes": [votes.count(0), votes.count(1)], "first_characters": 5,
                "second_characters": 9, "first_reward": float(1 - judge_vote), "second_reward": float(judge_vote),
            }
        )  # fmt: skip
    metrics = evaluation_figures.flatten(evaluation_figures.report(AGREEMENT, items))
    assert metrics["judge_people/agreement"] == pytest.approx(numpy.mean(numpy.array(judge_votes) == human_votes))
    assert metrics["judge_people/kappa"] == pytest.approx(cohen_kappa_score(judge_votes, human_votes))
    assert metrics["people_people/cases"] == len(pairs) / 2
    assert metrics["people_people/agreement"] == pytest.approx(numpy.mean([first == second for first, second in pairs]))
    assert metrics["people_people/kappa"] == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))
    assert metrics["judge_prefers_longer"] == pytest.approx(numpy.mean(judge_votes)), (
        "the second answer is the longer one"
    )


def test_many_votes_are_counted_and_not_enumerated() -> None:
    """20,000 votes on one pair are 400 million pairs of votes."""
    item = {"prompt_number": 0, "votes": [15_000, 5_000], "first_characters": 3, "second_characters": 1}
    metrics = evaluation_figures.flatten(
        evaluation_figures.report(AGREEMENT, [item, item | {"prompt_number": 1, "votes": [1, 0]}])
    )
    assert metrics["people_people/cases"] == 20_000 * 19_999 / 2
    assert metrics["people_people/agreement"] == pytest.approx((15e3 * 14_999 + 5e3 * 4_999) / (20e3 * 19_999))


def test_a_tie_of_the_judge_agrees_with_no_vote() -> None:
    item = {"prompt_number": 0, "votes": [2, 0], "first_characters": 1, "second_characters": 1}
    items = [item | {"first_reward": 1.0, "second_reward": 1.0}, item | {"first_reward": 1.0, "second_reward": 0.0}]
    metrics = evaluation_figures.flatten(evaluation_figures.report(AGREEMENT, items))
    assert metrics["judge_people/agreement"] == 0.5 and metrics["judge_people/without_ties/agreement"] == 1.0


def test_the_cost_is_computed_from_prices_per_million_tokens() -> None:
    tokens = [(100, 20), (300, 40)]
    assert evaluation_figures.judge_usage(None, tokens) == {"answers": 2, "input_tokens": 400, "output_tokens": 60}
    assert evaluation_figures.judge_usage(Price(input=2.5, output=10), tokens)["cost"] == pytest.approx(0.0016)
