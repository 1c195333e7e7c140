"""Expert-specialised fine-tuning (Wang et al., 2024): finds the routed experts that a task uses, and trains only
those."""

from .choice import OFFICIAL_SWITCHES, ExpertChoice, read_choice, smallest_set
from .full_weights import trained_rows
from .scores import THRESHOLDS, ExpertScores, Score, score_experts

__all__ = [
    "OFFICIAL_SWITCHES",
    "THRESHOLDS",
    "ExpertChoice",
    "ExpertScores",
    "Score",
    "read_choice",
    "score_experts",
    "smallest_set",
    "trained_rows",
]
