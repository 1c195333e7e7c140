"""Combines the scores of a reward model's heads for one answer into one score."""

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Literal

Combine = Literal["mean", "min", "mean_minus_std"]

# Besides the plain mean: scores that a policy can raise only by convincing every head, or heads that agree (Coste et
# al., "Reward Model Ensembles Help Mitigate Overoptimization", 2024).
COMBINE: dict[Combine, Callable[[Sequence[float]], float]] = {
    "mean": fmean,
    "min": min,
    "mean_minus_std": lambda scores: fmean(scores) - pstdev(scores),
}
