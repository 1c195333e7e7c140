"""The statistics of a reward model's scores, kept with it: its training writes them, whoever uses it reads them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from conversations.errors import ToolkitError
from conversations.run_files import REWARD_STATS

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class RewardStats:
    """Mean and spread of a reward model's scores of its training pairs, and how many scores they are from."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, scores: "Sequence[float]") -> "RewardStats":
        return cls(fmean(scores), pstdev(scores), len(scores))

    @classmethod
    def read(cls, folder: Path) -> "RewardStats":
        """From reward_stats.json in a reward model's final/.

        Raises:
            ToolkitError: it is missing, or damaged.
        """
        path = folder / REWARD_STATS
        if not path.is_file():
            raise ToolkitError(f"{path} is missing: train the reward model with `dsv2 reward`, or set normalize: false")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            stats = cls(mean=float(values["mean"]), std=float(values["std"]), n=int(values["n"]))
            if not (math.isfinite(stats.mean) and math.isfinite(stats.std) and stats.std >= 0):
                raise ValueError(f"mean is {stats.mean} and std {stats.std}")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ToolkitError(f"{path}: unreadable statistics ({error}); train the reward model again") from error
        return stats
