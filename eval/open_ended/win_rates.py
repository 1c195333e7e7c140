"""Win rates against a baseline, and what they would be if both wrote equally long answers."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from eval.figures import Figure, measured

_STRENGTH = 100.0  # inverse of the penalty on the coefficient of length, as AlpacaEval's


def length_controlled(
    values: Sequence[float], lengths: Sequence[tuple[int, int]], clusters: Sequence[Hashable]
) -> Figure:
    """The win rate at equal lengths, with its bootstrap interval.

    As AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475): a logistic regression of the outcome on tanh(d / std(d)), d
    being the answer's length minus the baseline's, predicts the outcome at d = 0. Left out of theirs is the difficulty
    of each instruction, which they fit on the answers of all models of their leaderboard.

    Args:
        values: outcomes, 1 for a win, 0.5 for a tie, 0 for a loss.
        lengths: (of the answer, of the baseline's) in characters.
        clusters: the question of each; those of one depend on one another.
    """
    outcome = np.array(values, dtype=float)
    longer = np.array([own - other for own, other in lengths], dtype=float)
    spread = longer.std()
    relative = np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)

    def measure(weights: Any) -> float:
        return _at_equal_length(outcome, relative, weights)

    return measured(measure, clusters)


def _at_equal_length(outcome: Any, relative: Any, weights: Any) -> float:
    """The fitted probability of a win at no difference in length. A tie is half a win and half a loss."""
    from sklearn.linear_model import LogisticRegression

    mean = float((weights * outcome).sum() / weights.sum())
    if mean in (0.0, 1.0) or not relative.any():
        return mean  # no fit: the outcome is certain, or lengths explain nothing
    features = np.concatenate([relative, relative])[:, None]
    won = np.repeat([1, 0], len(outcome))
    model = LogisticRegression(C=_STRENGTH)
    model.fit(features, won, sample_weight=np.concatenate([weights * outcome, weights * (1 - outcome)]))
    return float(model.predict_proba(np.zeros((1, 1)))[0, 1])
