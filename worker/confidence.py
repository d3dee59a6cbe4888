"""Means, rates and agreement with standard errors and confidence intervals. Takes NumPy arrays, returns floats."""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Floats = NDArray[numpy.float64]

RESAMPLES = 2000
"""Number of bootstrap resamples."""
BLOCK = 1 << 20
"""Number of draws that are in memory at once."""
LEVEL = 0.95
"""Coverage of the confidence intervals."""


@dataclass(frozen=True)
class IntervalEstimate:
    """A value with its standard error and its 95 % confidence interval. Numbers that are not known are NaN."""

    value: float
    error: float
    low: float
    high: float


def clusters(names: Sequence[Hashable]) -> list[NDArray[numpy.int64]]:
    """The positions of each distinct name, in the order of first occurrence."""
    positions: dict[Hashable, list[int]] = {}
    for position, name in enumerate(names):
        positions.setdefault(name, []).append(position)
    return [numpy.array(cluster) for cluster in positions.values()]


def mean(values: Sequence[float] | Floats, prompts: Sequence[Hashable] | None = None) -> IntervalEstimate:
    """The mean of `values` [n] with its standard error, by the normal approximation.

    `prompts` names the prompt of each value. Values of one prompt are not independent, so the error is that of a mean
    over clusters (linearised ratio, Cochran 1977, eq. 6.13). With one cluster, error and interval are NaN.
    """
    array = numpy.asarray(values, numpy.float64)
    center = float(array.mean())
    residuals = array - center
    totals = residuals if prompts is None else numpy.array([residuals[cluster].sum() for cluster in clusters(prompts)])
    count = len(totals)
    if count < 2:
        return IntervalEstimate(center, math.nan, math.nan, math.nan)
    error = math.sqrt(count / (count - 1) * float((totals**2).sum())) / len(array)
    return IntervalEstimate(center, error, center - 1.959964 * error, center + 1.959964 * error)


def rate(points: Sequence[float] | Floats, prompts: Sequence[Hashable]) -> IntervalEstimate:
    """The mean of `points` (1 or 0, ½ for a tie) with Wilson's interval (1927), which also holds near 0 and 1.

    Cases of one prompt are not independent. They count as p(1 − p)/error² independent cases, the number
    that would have the error of `mean`. If all cases agree, they count as one case per prompt.
    """
    count, clustered = len(set(prompts)), mean(points, prompts)
    share, error = clustered.value, clustered.error
    if count == len(points) or error == 0:
        return _wilson(share, count)
    if math.isnan(error):
        return clustered
    interval = _wilson(share, min(len(points), share * (1 - share) / error**2))
    return IntervalEstimate(share, error, interval.low, interval.high)


def _wilson(share: float, count: float) -> IntervalEstimate:
    """Wilson's score interval of a share of `count` independent cases. `count` need not be a whole number."""
    z = 1.959964
    middle, width = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    error = math.sqrt(share * (1 - share) / count)
    # Rounding must not put the share outside its own interval.
    return IntervalEstimate(share, error, min(share, (middle - width) / scale), max(share, (middle + width) / scale))


def win_rate(points: Sequence[float] | Floats, prompts: Sequence[Hashable], seed: int = 0) -> IntervalEstimate:
    """The mean of `points` (1 a win, ½ a tie, 0 a loss), with a percentile bootstrap (Efron 1979) over prompts.

    If all prompts have the same mean, the bootstrap has no spread. The interval is then Wilson's, with one case per
    prompt. With one prompt, error and interval are NaN.
    """
    array = numpy.asarray(points, numpy.float64)
    groups = clusters(prompts)
    sums, counts = [array[group].sum() for group in groups], [float(len(group)) for group in groups]
    return share(numpy.array(sums), numpy.array(counts), seed)


def share(sums: Floats, counts: Floats, seed: int = 0) -> IntervalEstimate:
    """Σ `sums` / Σ `counts` with the interval of `win_rate`. Both arrays hold one number per prompt."""
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return IntervalEstimate(value, math.nan, math.nan, math.nan)
    if numpy.ptp(sums / counts) == 0:
        return _wilson(value, len(sums))
    resampled = numpy.concatenate([(drawn @ sums) / (drawn @ counts) for drawn in _resamples(len(sums), seed)])
    low, high = numpy.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return IntervalEstimate(value, float(numpy.std(resampled, ddof=1)), float(low), float(high))


def _resamples(count: int, seed: int) -> Iterator[Floats]:
    """Bootstrap resamples of `count` prompts: how often each is drawn, in blocks of shape (resamples, `count`)."""
    generator, rows = numpy.random.default_rng(seed), max(1, BLOCK // count)
    for begin in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - begin)
        drawn = generator.integers(count, size=(size, count)) + count * numpy.arange(size)[:, None]
        yield numpy.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(numpy.float64)


@dataclass(frozen=True)
class Bin:
    """The pairs whose confidence lies in [`low`, `high`): their number, mean confidence and accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def calibration(margins: Sequence[float] | Floats, bins: int = 10) -> tuple[float, list[Bin]]:
    """(expected calibration error, reliability bins) of σ(margin), the probability that the chosen answer is better.

    A margin below zero prefers the rejected answer, with confidence 1 − σ(margin). Confidences therefore lie in
    [½, 1], which is divided into `bins` of equal width. Empty bins are left out. A margin of zero is a guess and
    counts as half right. ECE = Σ_b n_b/n · |accuracy_b − confidence_b| (Guo et al. 2017, eq. 3).
    """
    array = numpy.asarray(margins, numpy.float64)
    confidence = 1 / (1 + numpy.exp(-numpy.abs(array)))
    right = accuracy_points(array)
    edges = numpy.linspace(0.5, 1.0, bins + 1)
    bin_of = numpy.clip(numpy.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    filled = [
        Bin(
            float(edges[k]), float(edges[k + 1]), int((bin_of == k).sum()),
            float(confidence[bin_of == k].mean()), float(right[bin_of == k].mean()),
        )
        for k in range(bins) if (bin_of == k).any()
    ]  # fmt: skip
    error = sum(entry.count / len(array) * abs(entry.accuracy - entry.confidence) for entry in filled)
    return float(error), filled


def accuracy_points(margins: Floats) -> Floats:
    """1 if a margin is above zero, ½ if it is zero, else 0. Zero counts ½, as a random choice would on average."""
    return numpy.where(margins > 0, 1.0, numpy.where(margins == 0, 0.5, 0.0))


def kappa(tables: Floats) -> IntervalEstimate:
    """Cohen's κ = (p_o − p_e)/(1 − p_e) of two raters of the same items (Cohen 1960), with a bootstrap over prompts.

    `tables` [n, k, k]: for each prompt, entry [i, j] counts how often one rater said class i and the other class j.
    The value is NaN if both raters always say the same class, because chance then explains all agreement. Error and
    interval are NaN if there are fewer than two prompts, or fewer than two resamples with a value.
    """
    value = float(_kappa(tables.sum(0)))
    if len(tables) < 2:
        return IntervalEstimate(value, math.nan, math.nan, math.nan)
    blocks = _resamples(len(tables), seed=0)
    resampled = numpy.concatenate([_kappa(numpy.tensordot(drawn, tables, 1)) for drawn in blocks])
    known = resampled[~numpy.isnan(resampled)]
    if len(known) < 2:
        return IntervalEstimate(value, math.nan, math.nan, math.nan)
    low, high = numpy.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return IntervalEstimate(value, float(numpy.std(known, ddof=1)), float(low), float(high))


def _kappa(tables: Floats) -> Floats:
    """κ of tables [..., k, k], as `kappa` takes them."""
    shares = tables / tables.sum((-2, -1), keepdims=True)
    expected = (shares.sum(-1) * shares.sum(-2)).sum(-1)
    observed = numpy.trace(shares, axis1=-2, axis2=-1)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        return numpy.asarray(numpy.where(expected > 1 - 1e-12, numpy.nan, (observed - expected) / (1 - expected)))
