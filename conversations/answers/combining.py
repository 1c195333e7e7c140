"""How the scores that the heads of a reward model give an answer become one."""

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Literal

Combine = Literal["mean", "min", "mean_minus_std"]

# What a policy can raise only by convincing every head, or those that agree (Coste et al., "Reward Model Ensembles Help
# Mitigate Overoptimization", 2024), beside the plain mean.
COMBINE: dict[Combine, Callable[[Sequence[float]], float]] = {
    "mean": fmean,
    "min": min,
    "mean_minus_std": lambda scores: fmean(scores) - pstdev(scores),
}
