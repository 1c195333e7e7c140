"""Figures of several answers to one prompt, of which some are right. No torch."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import fmean


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k answers is right, estimated without bias from n answers of which some are right: 1 -
    C(n - right, k) / C(n, k) (Chen et al., "Evaluating Large Language Models Trained on Code", 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def sizes_of_k(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({n, *(2**power for power in range(n.bit_length()))} & set(range(1, n + 1)))


def majority_score(read: Sequence[Hashable | None], scores: Sequence[float]) -> float:
    """cons@n (Wang et al., "Self-Consistency", 2023): the score of what most answers say.

    read: what was read from each answer, None for an answer without one, which has no vote. The mean of equally common
    ones, which is what drawing one of them would give; 0 without any vote.
    """
    votes = Counter(one for one in read if one is not None)
    if not votes:
        return 0.0
    score_of = {one: score for one, score in zip(read, scores, strict=True)}
    most = max(votes.values())
    return fmean(score_of[one] for one, count in votes.items() if count == most)
