"""The statistics of a reward model's scores, stored with it when it is trained and read wherever it is used."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from conversations.errors import ToolkitError
from conversations.run_files import REWARD_STATS

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class RewardStats:
    """Mean and standard deviation of a reward model's scores of its training data, and the number of scores; with
    several heads, of their mean score, and of each head."""

    mean: float
    std: float
    n: int
    heads: tuple["RewardStats", ...] = ()

    @classmethod
    def of(cls, scores: "Sequence[Sequence[float]]") -> "RewardStats":
        """scores: [answers, heads]."""
        by_head = [cls(fmean(column), pstdev(column), len(column)) for column in zip(*scores, strict=True)]
        if len(by_head) == 1:
            return by_head[0]
        means = [fmean(row) for row in scores]
        return cls(fmean(means), pstdev(means), len(means), tuple(by_head))

    @property
    def by_head(self) -> "list[RewardStats]":
        """The statistics of each head."""
        return list(self.heads) or [self]

    def as_json(self) -> dict[str, Any]:
        heads = [head.as_json() for head in self.heads]
        return {"mean": self.mean, "std": self.std, "n": self.n, **({"heads": heads} if heads else {})}

    @classmethod
    def _from_json(cls, values: Any) -> "RewardStats":
        mean, std, n = float(values["mean"]), float(values["std"]), int(values["n"])
        stats = cls(mean, std, n, tuple(cls._from_json(head) for head in values.get("heads", ())))
        if not (math.isfinite(stats.mean) and math.isfinite(stats.std) and stats.std >= 0):
            raise ValueError(f"mean is {stats.mean} and std {stats.std}")
        return stats

    @classmethod
    def read(cls, folder: Path) -> "RewardStats":
        """From reward_stats.json in a reward model's final/.

        Raises:
            ToolkitError: the file is missing or damaged.
        """
        path = folder / REWARD_STATS
        if not path.is_file():
            raise ToolkitError(f"{path} is missing: train the reward model with `dsv2 reward`, or set normalize: false")
        try:
            return cls._from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ToolkitError(f"{path}: unreadable statistics ({error}); train the reward model again") from error
