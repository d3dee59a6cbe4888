"""Estimates of evaluations against scikit-learn, SciPy, closed forms, and what they promise: their coverage."""

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import cohen_kappa_score

from worker import confidence


def test_a_mean_of_independent_values_has_the_textbook_error() -> None:
    values = numpy.random.default_rng(1).gamma(2.0, size=300)
    found = confidence.mean(values)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(stats.sem(values))
    assert found.high - found.value == pytest.approx(stats.norm.ppf(0.975) * stats.sem(values), rel=1e-6)
    assert confidence.mean(values, list(range(300))).error == pytest.approx(found.error)


@pytest.mark.parametrize(("right", "of"), [(0, 12), (7, 30), (30, 30), (612, 1000)])
def test_a_rate_has_wilsons_interval(right: int, of: int) -> None:
    found = confidence.rate([1.0] * right + [0.0] * (of - right), range(of))
    expected = stats.binomtest(right, of).proportion_ci(method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((right / of, expected.low, expected.high), abs=1e-6)


def test_an_error_over_clusters_covers_the_truth_where_a_plain_one_does_not() -> None:
    generator = numpy.random.default_rng(2)
    covered, plain = 0, 0
    for _ in range(400):
        prompts = generator.normal(size=60)
        values = (prompts[:, None] + 0.3 * generator.normal(size=(60, 4))).ravel()
        names = numpy.repeat(numpy.arange(60), 4).tolist()
        found, naive = confidence.mean(values, names), confidence.mean(values)
        covered += found.low <= 0 <= found.high
        plain += naive.low <= 0 <= naive.high
    assert 0.91 <= covered / 400 <= 0.98
    assert plain / 400 < 0.8, "completions of one prompt are not independent"


def test_equal_clusters_are_the_means_of_clusters() -> None:
    values = numpy.random.default_rng(3).normal(size=(40, 5))
    found = confidence.mean(values.ravel(), numpy.repeat(numpy.arange(40), 5).tolist())
    assert found.error == pytest.approx(stats.sem(values.mean(1)))
    assert math.isnan(confidence.mean([1.0, 2.0], ["a", "a"]).error), "one prompt says nothing of others"


def test_a_win_rate_is_bootstrapped_as_scipy_does() -> None:
    points = random.Random(4).choices([0.0, 0.5, 1.0], [3, 1, 6], k=250)
    found = confidence.win_rate(points, range(250), seed=1)
    expected = stats.bootstrap((points,), numpy.mean, method="percentile", n_resamples=4000, rng=5)
    assert found.value == pytest.approx(numpy.mean(points))
    assert found.error == pytest.approx(expected.standard_error, rel=0.05)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.01)
    assert confidence.win_rate(points, range(250), seed=1) == found, "the same each time"


def test_a_bootstrap_over_prompts_knows_that_completions_hang_together() -> None:
    points = [float(k % 2) for k in range(40) for _ in range(8)]
    alone = confidence.win_rate(points, range(320))
    together = confidence.win_rate(points, [k for k in range(40) for _ in range(8)])
    assert together.error == pytest.approx(alone.error * math.sqrt(8), rel=0.1)


def test_a_rate_of_cases_that_hang_together_is_as_sure_as_their_names_are_many() -> None:
    points, names = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b", "c", "c"]
    found = confidence.rate(points, names)
    assert (found.value, found.error) == (4 / 6, confidence.mean(points, names).error)
    # Its error is 1/3, by hand; so are those of p(1 − p)/error² = 2 independent cases.
    two = confidence.rate([1.0, 1 / 3], "ab")
    assert found.error == pytest.approx(1 / 3) and (found.low, found.high) == pytest.approx((two.low, two.high))
    assert confidence.rate([1, 1, 1, 1, 1, 0], list("aabbcc")).high <= 1, "it stays a share"
    found = confidence.rate([1.0] * 6, names)
    assert found.low == pytest.approx(stats.binomtest(3, 3).proportion_ci(method="wilson").low, abs=1e-6)


def test_where_all_prompts_say_the_same_a_win_rate_is_still_not_certain() -> None:
    found = confidence.win_rate([1.0] * 40, [k // 2 for k in range(40)])
    expected = stats.binomtest(20, 20).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert math.isnan(confidence.win_rate([1.0, 0.0], ["a", "a"]).low), "one prompt says nothing of others"


def tables(first: Sequence[str], second: Sequence[str], prompts: Iterable[int]) -> Any:
    """How often two raters say what, for each prompt."""
    numbers = list(prompts)
    found = numpy.zeros((max(numbers) + 1, 3, 3))
    for one, other, number in zip(first, second, numbers, strict=True):
        found[number, "abt".index(one), "abt".index(other)] += 1
    return found


@given(
    st.lists(st.tuples(st.sampled_from("abt"), st.sampled_from("abt")), min_size=2, max_size=60),
)
@settings(deadline=None, max_examples=50)
def test_kappa_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = confidence.kappa(tables(first, second, range(len(first))))
    if len({*first, *second}) == 1:
        assert math.isnan(found.value)
    else:
        assert found.value == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_the_interval_of_kappa_covers_the_truth_as_often_as_it_says() -> None:
    """Two raters who agree by more than chance: what many items say is the truth for few."""
    generator = numpy.random.default_rng(11)

    def raters(count: int) -> tuple[list[str], list[str]]:
        truth = generator.integers(2, size=count)
        noisy = [numpy.where(generator.random(count) < 0.2, 1 - truth, truth) for _ in range(2)]
        return ["ab"[k] for k in noisy[0]], ["ab"[k] for k in noisy[1]]

    truth = (0.68 - 0.5) / 0.5
    hits = 0
    for _ in range(100):
        found = confidence.kappa(tables(*raters(150), range(150)))
        hits += found.low <= truth <= found.high
    assert 87 <= hits < 100
    many = confidence.kappa(tables(*raters(200_000), [k % 1000 for k in range(200_000)]))
    assert many.value == pytest.approx(truth, abs=0.01)


def test_reliability_bins_are_those_of_scikit_learn() -> None:
    margins = numpy.random.default_rng(5).normal(0.4, 1.5, size=3000)
    error, bins = confidence.calibration(margins, 5)
    certainty = 1 / (1 + numpy.exp(-abs(margins)))
    accuracy, mean = calibration_curve(margins > 0, 2 * certainty - 1, n_bins=5)
    assert [one.accuracy for one in bins] == pytest.approx(accuracy.tolist())
    assert [one.confidence for one in bins] == pytest.approx(((mean + 1) / 2).tolist())
    assert sum(one.count for one in bins) == 3000
    assert error == pytest.approx(sum(b.count / 3000 * abs(b.accuracy - b.confidence) for b in bins))


def test_probabilities_that_are_true_are_calibrated() -> None:
    generator = numpy.random.default_rng(6)
    belief = generator.normal(0, 2, size=20_000)
    chosen_first = generator.random(20_000) < 1 / (1 + numpy.exp(-belief))
    error, _ = confidence.calibration(numpy.where(chosen_first, belief, -belief))
    assert error < 0.02
    overconfident, _ = confidence.calibration(3 * numpy.where(chosen_first, belief, -belief))
    assert overconfident > 0.08
    equal, bins = confidence.calibration([0.0] * 10)
    assert equal == 0 and bins[0].accuracy == 0.5, "one that cannot tell says so"
