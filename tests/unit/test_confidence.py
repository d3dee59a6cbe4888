"""Estimates with intervals against scikit-learn, SciPy and closed forms, and the coverage that they promise."""

import math
import random
from collections.abc import Iterable, Sequence

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import cohen_kappa_score

from worker import confidence


def test_a_mean_of_independent_values_has_the_textbook_error() -> None:
    values = numpy.random.default_rng(1).gamma(2.0, size=300)
    estimate = confidence.mean(values)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.error == pytest.approx(stats.sem(values))
    assert estimate.high - estimate.value == pytest.approx(stats.norm.ppf(0.975) * stats.sem(values), rel=1e-6)
    assert confidence.mean(values, list(range(300))).error == pytest.approx(estimate.error)


@pytest.mark.parametrize(("successes", "trials"), [(0, 12), (7, 30), (30, 30), (612, 1000)])
def test_a_rate_has_wilsons_interval(successes: int, trials: int) -> None:
    estimate = confidence.rate([1.0] * successes + [0.0] * (trials - successes), range(trials))
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
        (successes / trials, expected.low, expected.high), abs=1e-6
    )


def test_a_clustered_interval_covers_the_truth_where_a_plain_one_does_not() -> None:
    generator = numpy.random.default_rng(2)
    clustered_hits, plain_hits = 0, 0
    for _ in range(400):
        prompts = generator.normal(size=60)
        values = (prompts[:, None] + 0.3 * generator.normal(size=(60, 4))).ravel()
        names = numpy.repeat(numpy.arange(60), 4).tolist()
        clustered, unclustered = confidence.mean(values, names), confidence.mean(values)
        clustered_hits += clustered.low <= 0 <= clustered.high
        plain_hits += unclustered.low <= 0 <= unclustered.high
    assert 0.91 <= clustered_hits / 400 <= 0.98
    assert plain_hits / 400 < 0.8, "completions of one prompt are not independent"


def test_the_error_over_equal_clusters_is_the_error_of_their_means() -> None:
    values = numpy.random.default_rng(3).normal(size=(40, 5))
    estimate = confidence.mean(values.ravel(), numpy.repeat(numpy.arange(40), 5).tolist())
    assert estimate.error == pytest.approx(stats.sem(values.mean(1)))
    assert math.isnan(confidence.mean([1.0, 2.0], ["a", "a"]).error), "one prompt says nothing about others"


def test_the_bootstrap_of_a_win_rate_agrees_with_scipy() -> None:
    points = random.Random(4).choices([0.0, 0.5, 1.0], [3, 1, 6], k=250)
    estimate = confidence.win_rate(points, range(250), seed=1)
    expected = stats.bootstrap((points,), numpy.mean, method="percentile", n_resamples=4000, rng=5)
    assert estimate.value == pytest.approx(numpy.mean(points))
    assert estimate.error == pytest.approx(expected.standard_error, rel=0.05)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.01)
    assert confidence.win_rate(points, range(250), seed=1) == estimate, "a seed gives the same result each time"


def test_a_bootstrap_over_prompts_treats_their_completions_as_dependent() -> None:
    points = [float(k % 2) for k in range(40) for _ in range(8)]
    independent = confidence.win_rate(points, range(320))
    clustered = confidence.win_rate(points, [k for k in range(40) for _ in range(8)])
    assert clustered.error == pytest.approx(independent.error * math.sqrt(8), rel=0.1)


def test_the_certainty_of_a_rate_of_dependent_cases_depends_on_the_number_of_clusters() -> None:
    points, names = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b", "c", "c"]
    estimate = confidence.rate(points, names)
    assert (estimate.value, estimate.error) == (4 / 6, confidence.mean(points, names).error)
    # By hand, its error is 1/3. This is also the error of p(1 − p)/error² = 2 independent cases.
    two_cases = confidence.rate([1.0, 1 / 3], "ab")
    assert estimate.error == pytest.approx(1 / 3) and (estimate.low, estimate.high) == pytest.approx(
        (two_cases.low, two_cases.high)
    )
    assert confidence.rate([1, 1, 1, 1, 1, 0], list("aabbcc")).high <= 1, "a rate is never above 1"
    estimate = confidence.rate([1.0] * 6, names)
    assert estimate.low == pytest.approx(stats.binomtest(3, 3).proportion_ci(method="wilson").low, abs=1e-6)


def test_a_unanimous_win_rate_is_still_uncertain() -> None:
    estimate = confidence.win_rate([1.0] * 40, [k // 2 for k in range(40)])
    expected = stats.binomtest(20, 20).proportion_ci(method="wilson")
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert math.isnan(confidence.win_rate([1.0, 0.0], ["a", "a"]).low), "one prompt says nothing about others"


def tables(first: Sequence[str], second: Sequence[str], prompts: Iterable[int]) -> NDArray[numpy.float64]:
    """For each prompt, the counts of what the two raters say: (prompts, 3, 3)."""
    numbers = list(prompts)
    counts = numpy.zeros((max(numbers) + 1, 3, 3))
    for first_answer, second_answer, number in zip(first, second, numbers, strict=True):
        counts[number, "abt".index(first_answer), "abt".index(second_answer)] += 1
    return counts


@given(
    st.lists(st.tuples(st.sampled_from("abt"), st.sampled_from("abt")), min_size=2, max_size=60),
)
@settings(deadline=None, max_examples=50)
def test_kappa_agrees_with_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    first, second = [answer for answer, _ in pairs], [answer for _, answer in pairs]
    estimate = confidence.kappa(tables(first, second, range(len(first))))
    if len({*first, *second}) == 1:
        assert math.isnan(estimate.value)
    else:
        assert estimate.value == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_the_interval_of_kappa_covers_the_truth_as_often_as_it_promises() -> None:
    """Two raters agree by more than chance. Kappa over many items confirms the truth."""
    generator = numpy.random.default_rng(11)

    def raters(count: int) -> tuple[list[str], list[str]]:
        truth = generator.integers(2, size=count)
        noisy = [numpy.where(generator.random(count) < 0.2, 1 - truth, truth) for _ in range(2)]
        return ["ab"[k] for k in noisy[0]], ["ab"[k] for k in noisy[1]]

    truth = (0.68 - 0.5) / 0.5
    hits = 0
    for _ in range(100):
        estimate = confidence.kappa(tables(*raters(150), range(150)))
        hits += estimate.low <= truth <= estimate.high
    assert 87 <= hits < 100
    large_sample = confidence.kappa(tables(*raters(200_000), [k % 1000 for k in range(200_000)]))
    assert large_sample.value == pytest.approx(truth, abs=0.01)


def test_reliability_bins_agree_with_scikit_learn() -> None:
    margins = numpy.random.default_rng(5).normal(0.4, 1.5, size=3000)
    error, bins = confidence.calibration(margins, 5)
    certainty = 1 / (1 + numpy.exp(-abs(margins)))
    accuracy, mean = calibration_curve(margins > 0, 2 * certainty - 1, n_bins=5)
    assert [reliability_bin.accuracy for reliability_bin in bins] == pytest.approx(accuracy.tolist())
    assert [reliability_bin.confidence for reliability_bin in bins] == pytest.approx(((mean + 1) / 2).tolist())
    assert sum(reliability_bin.count for reliability_bin in bins) == 3000
    assert error == pytest.approx(
        sum(
            reliability_bin.count / 3000 * abs(reliability_bin.accuracy - reliability_bin.confidence)
            for reliability_bin in bins
        )
    )


def test_true_probabilities_are_calibrated_and_exaggerated_ones_are_not() -> None:
    generator = numpy.random.default_rng(6)
    belief = generator.normal(0, 2, size=20_000)
    chosen_first = generator.random(20_000) < 1 / (1 + numpy.exp(-belief))
    error, _ = confidence.calibration(numpy.where(chosen_first, belief, -belief))
    assert error < 0.02
    overconfident, _ = confidence.calibration(3 * numpy.where(chosen_first, belief, -belief))
    assert overconfident > 0.08
    equal, bins = confidence.calibration([0.0] * 10)
    assert equal == 0 and bins[0].accuracy == 0.5, "a judge that cannot decide is calibrated"
