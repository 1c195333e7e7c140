"""A curriculum by pass rate: prompts that the policy answers right about as often as wanted are drawn more often.

Groups in which all answers are right, or all wrong, teach nothing; most is learnt where about half are right (Bae et
al., "Online Difficulty Filtering for Reasoning Oriented Reinforcement Learning", arXiv 2504.03380).
"""

import math
from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

import torch

from conversations.row import Row
from rl.rollouts.groups import OtherPrompts, generator_of

LEARNT = 0.5  # weight of a prompt's newest pass rate in its estimate, since the policy changes
LEAST = 0.05  # of the weight of a prompt at the target: every prompt is drawn again some time


def prompt_weights(rates: torch.Tensor, target: float) -> torch.Tensor:
    """How often prompts are drawn, relative to each other, [prompts] from their pass rates: 1 at the target, falling
    linearly to LEAST at the rate that is farthest from it. Prompts without a rate (NaN) have 1, to be tried."""
    distance = (rates - target).abs() / max(target, 1 - target)
    return torch.where(rates.isnan(), 1.0, 1 - (1 - LEAST) * distance)


class CurriculumPrompts(OtherPrompts):
    """The rows of the data, drawn by their pass rates; all processes draw the same.

    rates: [prompts] float64, the estimated pass rate of each row's prompt, NaN before its first answers. With `drawn`,
    how often an order was drawn, they are all of its state.
    """

    def __init__(self, rows: Any, seed: int, target: float):
        super().__init__(rows, seed)
        self.target = target
        self.rates = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        self.verdicts: list[bool] = []  # on the answers of this rollout

    def draw(self, count: int) -> list[Row]:
        """So many different rows, for a new rollout."""
        self.verdicts = []
        return [self.rows[number] for number in self._by_weight()[:count]]

    def learn(self, answers: Iterable[tuple[int, bool]]) -> None:
        """Take in the numbers of the rows that were answered, and whether each answer was right."""
        by_row: dict[int, list[bool]] = {}
        for number, right in answers:
            by_row.setdefault(number, []).append(right)
            self.verdicts.append(right)
        for number, verdicts in by_row.items():
            newest, known = sum(verdicts) / len(verdicts), float(self.rates[number])
            self.rates[number] = newest if math.isnan(known) else known + LEARNT * (newest - known)

    def figures(self) -> dict[str, float]:
        """seen: prompts that were answered so far; effective_prompts: (sum of weights)^2 / sum of squared weights, the
        number of prompts that, drawn equally often, would be as varied. pass_rate: the share of right answers in this
        rollout."""
        weights = prompt_weights(self.rates, self.target)
        return {
            "seen": float((~self.rates.isnan()).sum()),
            "effective_prompts": float(weights.sum() ** 2 / weights.square().sum()),
            "pass_rate": fmean(self.verdicts),
        }

    def state(self) -> dict[str, Any]:
        return {**super().state(), "rates": self.rates}

    def restore(self, saved: dict[str, Any]) -> None:
        super().restore(saved)
        self.rates = saved["rates"]

    def _others(self, taken: set[str]) -> Iterator[Row]:
        return self._not_taken(self._by_weight(), taken)

    def _by_weight(self) -> list[int]:
        """All rows in a random order in which each next one comes with a probability proportional to its weight
        (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006)."""
        waits = torch.empty(len(self.rates), dtype=torch.float64)
        waits.exponential_(generator=generator_of(self.seed, self.drawn))
        self.drawn += 1
        return (waits / prompt_weights(self.rates, self.target)).argsort().tolist()
