"""What evaluations report: means, rates and agreement, each with how sure it is. NumPy arrays in, plain numbers out."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Floats = NDArray[numpy.float64]

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class IntervalEstimate:
    """A value with its standard error and its 95 % confidence interval."""

    value: float
    error: float
    low: float
    high: float


def clusters(names: Sequence[Hashable]) -> list[NDArray[numpy.int64]]:
    """The positions of each name, in the order in which names come first."""
    found: dict[Hashable, list[int]] = {}
    for position, name in enumerate(names):
        found.setdefault(name, []).append(position)
    return [numpy.array(positions) for positions in found.values()]


def mean(values: Sequence[float] | Floats, names: Sequence[Hashable] | None = None) -> IntervalEstimate:
    """The mean of `values` [n] with its standard error, by the normal approximation.

    Values that share a name (completions of one prompt) are not independent: the error is then that of a mean over
    clusters (linearised ratio, Cochran 1977, eq. 6.13). With one cluster the error is not known: NaN.
    """
    given = numpy.asarray(values, numpy.float64)
    center = float(given.mean())
    apart = given - center
    totals = apart if names is None else numpy.array([apart[one].sum() for one in clusters(names)])
    count = len(totals)
    if count < 2:
        return IntervalEstimate(center, math.nan, math.nan, math.nan)
    error = math.sqrt(count / (count - 1) * float((totals**2).sum())) / len(given)
    return IntervalEstimate(center, error, center - 1.959964 * error, center + 1.959964 * error)


def rate(points: Sequence[float] | Floats, names: Sequence[Hashable]) -> IntervalEstimate:
    """A share of cases (1 or 0, ½ a tie) with Wilson's interval (1927), which holds near 0 and 1 too.

    Cases that share a name are not independent: they count as the number of independent ones that would have the error
    of `mean`, p(1 − p)/error²; where all say the same, as one for each name.
    """
    count, found = len(set(names)), mean(points, names)
    if count == len(points) or found.error == 0:
        return _wilson(found.value, count)
    if math.isnan(found.error):
        return found
    worth = _wilson(found.value, min(len(points), found.value * (1 - found.value) / found.error**2))
    return IntervalEstimate(found.value, found.error, worth.low, worth.high)


def _wilson(share: float, count: float) -> IntervalEstimate:
    z = 1.959964
    middle, width = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    error = math.sqrt(share * (1 - share) / count)
    # Rounding must not leave the share outside of its own interval.
    return IntervalEstimate(share, error, min(share, (middle - width) / scale), max(share, (middle + width) / scale))


def win_rate(points: Sequence[float] | Floats, prompts: Sequence[Hashable], seed: int = 0) -> IntervalEstimate:
    """The mean of `points` (1 a win, ½ a tie, 0 a loss), with a percentile bootstrap (Efron 1979) over prompts.

    Where all prompts say the same there is nothing to draw from: Wilson's interval then, with a case for each prompt.
    With one prompt nothing is known of others: NaN.
    """
    given = numpy.asarray(points, numpy.float64)
    groups = clusters(prompts)
    return share(
        numpy.array([given[one].sum() for one in groups]), numpy.array([float(len(one)) for one in groups]), seed
    )


def share(sums: Floats, counts: Floats, seed: int = 0) -> IntervalEstimate:
    """The sum of `sums` over that of `counts`, which are of a prompt each, with the interval of `win_rate`."""
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return IntervalEstimate(value, math.nan, math.nan, math.nan)
    if numpy.ptp(sums / counts) == 0:
        return _wilson(value, len(sums))
    generator, found = numpy.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(sums), size=len(sums))
        found.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = numpy.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return IntervalEstimate(value, float(numpy.std(found, ddof=1)), float(low), float(high))


@dataclass(frozen=True)
class Bin:
    """Of the pairs whose confidence lies in [`low`, `high`): how many, how sure on average, and how often right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def calibration(margins: Sequence[float] | Floats, bins: int = 10) -> tuple[float, list[Bin]]:
    """(expected calibration error, reliability bins) of σ(margin), the probability that the chosen answer is better.

    A margin below zero prefers the rejected answer, with confidence 1 − σ(margin): confidences lie in [½, 1], in
    `bins` of equal width. ECE = Σ_b n_b/n · |accuracy_b − confidence_b| (Guo et al. 2017, eq. 3). A margin of zero is
    a guess: half right.
    """
    given = numpy.asarray(margins, numpy.float64)
    confidence = 1 / (1 + numpy.exp(-numpy.abs(given)))
    right = accuracy_points(given)
    edges = numpy.linspace(0.5, 1.0, bins + 1)
    place = numpy.clip(numpy.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    found = [
        Bin(
            float(edges[k]), float(edges[k + 1]), int((place == k).sum()),
            float(confidence[place == k].mean()), float(right[place == k].mean()),
        )
        for k in range(bins) if (place == k).any()
    ]  # fmt: skip
    error = sum(one.count / len(given) * abs(one.accuracy - one.confidence) for one in found)
    return float(error), found


def accuracy_points(margins: Floats) -> Floats:
    """1 where a margin is above zero, ½ where it is zero, else 0: what random choices between equals would earn."""
    return numpy.where(margins > 0, 1.0, numpy.where(margins == 0, 0.5, 0.0))


def kappa(tables: Floats) -> IntervalEstimate:
    """Cohen's κ = (p_o − p_e)/(1 − p_e) of two raters of the same items (Cohen 1960), with a bootstrap over prompts.

    `tables` [n, k, k] count, for each prompt, how often one says what in its rows and the other what in its columns.
    NaN where both always say the same one thing: then chance alone explains all. So are errors that are not known.
    """
    value = float(_kappa(tables.sum(0)))
    if len(tables) < 2:
        return IntervalEstimate(value, math.nan, math.nan, math.nan)
    generator, found = numpy.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = numpy.bincount(generator.integers(len(tables), size=len(tables)), minlength=len(tables))
        found.append(float(_kappa(numpy.tensordot(drawn.astype(numpy.float64), tables, 1))))
    known = numpy.array(found)[~numpy.isnan(found)]
    if len(known) < 2:
        return IntervalEstimate(value, math.nan, math.nan, math.nan)
    low, high = numpy.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return IntervalEstimate(value, float(numpy.std(known, ddof=1)), float(low), float(high))


def _kappa(tables: Floats) -> Floats:
    """κ of tables [..., k, k] that count what two raters say of the same items."""
    shares = tables / tables.sum((-2, -1), keepdims=True)
    expected = (shares.sum(-1) * shares.sum(-2)).sum(-1)
    observed = numpy.trace(shares, axis1=-2, axis2=-1)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        return numpy.asarray(numpy.where(expected > 1 - 1e-12, numpy.nan, (observed - expected) / (1 - expected)))
