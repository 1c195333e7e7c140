"""Figures with their 95 % intervals, in the form of results.json. No torch."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from conversations.answers.intervals import bootstrap_interval, mean_interval, resampled_interval

Figure = dict[str, Any]  # value, interval, n
Measure = Callable[[Any], float]  # weights of the rows [N] -> the figure; NaN if it is undefined
LOSS = "loss"  # the decoding of the metric `loss`


def share(values: Sequence[float], clusters: Sequence[Hashable]) -> Figure:
    """The mean of values from 0 to 1; its value is None if there are none."""
    if not values:
        return {"value": None, "interval": None, "n": 0}
    return {"value": fmean(values), "interval": [*mean_interval(values, clusters)], "n": len(values)}


def measured(measure: Measure, clusters: Sequence[Hashable], n: int | None = None) -> Figure:
    """A measure of N rows, with a bootstrap's interval; its value is None if it is undefined.

    n: the number of rows behind it, if not N.
    """
    value = measure(np.ones(len(clusters)))
    defined = not np.isnan(value)
    interval = [*bootstrap_interval(measure, clusters)] if defined and _several(clusters) else None
    return {"value": value if defined else None, "interval": interval, "n": len(clusters) if n is None else n}


def aggregated(
    aggregate: Callable[[Sequence[Any]], float], values: Sequence[Any], clusters: Sequence[Hashable]
) -> Figure:
    """As `measured`, for a function of a list of values, such as lm-eval's aggregations."""
    interval = [*resampled_interval(aggregate, values, clusters)] if _several(clusters) else None
    return {"value": float(aggregate(values)), "interval": interval, "n": len(values)}


def _several(clusters: Sequence[Hashable]) -> bool:
    """Whether values differ between clusters at all: drawn from a single one, a bootstrap would always be the same."""
    return len(set(clusters)) > 1


def figures_of_metric(samples: Sequence[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """{"n": rows} and for each decoding the mean value, "DECODING_interval", and of answers the shares
    "DECODING_truncated" and, of rules that look for an answer, "DECODING_unread". A loss is the mean over tokens."""
    values: dict[str, Any] = {"n": rows}
    for decoding in dict.fromkeys(sample["decoding"] for sample in samples):
        decoded = [sample for sample in samples if sample["decoding"] == decoding]
        found = _mean_loss(decoded) if decoding == LOSS else _mean_value(decoded)
        values |= {decoding: found["value"], f"{decoding}_interval": found["interval"]}
        if "truncated" in decoded[0]:
            values[f"{decoding}_truncated"] = fmean(sample["truncated"] for sample in decoded)
        if "read" in decoded[0]:
            values[f"{decoding}_unread"] = fmean(sample["read"] is None for sample in decoded)
    return values


def _mean_value(samples: Sequence[Mapping[str, Any]]) -> Figure:
    return share([sample["value"] for sample in samples], [sample["prompt"] for sample in samples])


def _mean_loss(samples: Sequence[Mapping[str, Any]]) -> Figure:
    """The mean over all tokens of the rows' mean losses."""
    losses, tokens = (np.array([sample[key] for sample in samples], dtype=float) for key in ("value", "weight"))

    def mean(weights: Any) -> float:
        return float((weights * tokens * losses).sum() / max(1.0, (weights * tokens).sum()))

    return measured(mean, range(len(samples)))
