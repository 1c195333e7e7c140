"""Confidence intervals of measured figures: the one place that decides which interval a figure has. No torch."""

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist, fmean
from typing import Any

Z95 = NormalDist().inv_cdf(0.975)
DRAWS = 500  # of a bootstrap
PAIRED_DRAWS = 2000  # of that of a difference
_DRAWN_AT_ONCE = 2**20  # clusters


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % confidence interval of a share of n (Wilson 1927); stays within [0, 1] even at 0 % and 100 %."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    # Rounding leaves 1e-17 of a bound that is 0.
    return max(0.0, centre - half) if share > 0 else 0.0, min(1.0, centre + half) if share < 1 else 1.0


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """95 % confidence interval of the mean of values from 0 to 1, of which those of one cluster (the answers to one
    prompt) depend on one another.

    Wilson's, for the number of independent yes-or-no answers that would leave the mean as uncertain as these values do
    (Dean and Pagano 2015). Of yes-or-no answers to different prompts that is their number; scores between 0 and 1 vary
    less and count for more, and answers to the same prompts count for less. Where nothing varies it is the number of
    clusters.
    """
    mean, n = fmean(values), len(values)
    residuals: dict[Hashable, float] = {}
    for place, value in enumerate(values):
        cluster = place if clusters is None else clusters[place]
        residuals[cluster] = residuals.get(cluster, 0.0) + value - mean
    groups = len(residuals)
    variance = sum(residual**2 for residual in residuals.values()) / n**2
    if groups < 2 or variance < 1e-12:
        return wilson(mean, groups)
    simple = mean * (1 - mean) / (n - 1)  # of yes-or-no answers, each to a prompt of its own
    return wilson(mean, n * simple / (variance * groups / (groups - 1)))


def bootstrap_interval(measure: Callable[[Any], float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95 % confidence interval of any figure: the percentiles of a bootstrap that draws whole clusters.

    Args:
        measure: weights of the rows [N], an array -> the figure, NaN where it is not defined.
        clusters: that of each row.
    """
    import numpy as np

    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    of_row, groups = np.array([numbers[cluster] for cluster in clusters]), len(numbers)
    rng = np.random.default_rng(0)
    equal = np.full(groups, 1 / groups)
    drawn = [measure(rng.multinomial(groups, equal)[of_row].astype(float)) for _ in range(DRAWS)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def resampled_interval(
    figure: Callable[[Sequence[Any]], float], values: Sequence[Any], clusters: Sequence[Hashable]
) -> tuple[float, float]:
    """As `bootstrap_interval`, for a figure of a list of values, such as lm-eval's aggregations."""
    return bootstrap_interval(
        lambda weights: figure(
            [value for value, count in zip(values, weights, strict=True) for _ in range(int(count))]
        ),
        clusters,
    )


def difference_interval(
    differences: Sequence[float], weights: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[float, float]:
    """95 % confidence interval of the weighted mean of differences between two models on the same rows, of which those
    of one cluster (the answers to one prompt) depend on one another.

    The percentiles of a bootstrap that draws whole clusters, expanded for their number (Hesterberg 2015). Two clusters
    are added, of the largest difference in either direction (as Bonett and Price 2012 do for yes-or-no answers): where
    hardly any row differs, the bootstrap alone would call a handful of chance differences certain.
    """
    import numpy as np

    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    of_row = np.array([numbers[cluster] for cluster in clusters])
    each, weight = np.array(differences, dtype=float), np.array(weights, dtype=float)
    sums, totals = np.bincount(of_row, each * weight), np.bincount(of_row, weight)
    largest = float(np.abs(sums).max()) or float(totals.mean())
    sums, totals = np.append(sums, [largest, -largest]), np.append(totals, [totals.mean()] * 2)
    groups, rng = len(sums), np.random.default_rng(0)
    at_once = max(1, _DRAWN_AT_ONCE // groups)
    parts = [rng.integers(groups, size=(at_once, groups)) for _ in range(-(-PAIRED_DRAWS // at_once))]
    drawn = np.concatenate([sums[part].sum(1) / totals[part].sum(1) for part in parts])
    tail = 100 * NormalDist().cdf(-Z95 * (1 + 1.2 / (groups - 1)) * math.sqrt(groups / (groups - 1)))
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)
