"""Which pairs of a prompt's answers to keep. Pure functions; no torch."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import permutations


@dataclass(frozen=True)
class Judged:
    """An answer to a prompt. reward: the weighted sum of its rewards. right: whether every rule gave it 1; None where
    no rule judged it. answer: its number among those of the prompt."""

    row: int
    answer: int
    text: str
    reward: float
    right: bool | None = None


@dataclass(frozen=True)
class Pair:
    """A better and a worse answer to one prompt."""

    chosen: Judged
    rejected: Judged

    @property
    def margin(self) -> float:
        return self.chosen.reward - self.rejected.reward

    @property
    def longer(self) -> int:
        """How many characters the chosen answer is longer than the rejected one."""
        return len(self.chosen.text) - len(self.rejected.text)


@dataclass
class LeftOut:
    """Why pairs were left out, with counts."""

    min_margin: int = 0
    max_pairs_per_prompt: int = 0
    duplicates: int = 0
    balance_lengths: int = field(default=0)


def distinct(answers: Iterable[Judged]) -> list[Judged]:
    """The answers to a prompt without those that say the same as an earlier one."""
    return list({judged.text: judged for judged in reversed(list(answers))}.values())[::-1]


def pairs_of(answers: Sequence[Judged], *, most: int, min_margin: float, seed: object, left_out: LeftOut) -> list[Pair]:
    """At most `most` pairs of distinct answers to one prompt: first those whose answers are in no pair yet, then those
    of similar length. seed: decides between pairs that are alike in that."""
    possible = [Pair(a, b) for a, b in permutations(answers, 2) if a.reward > b.reward]
    candidates = [pair for pair in possible if pair.margin >= min_margin]
    left_out.min_margin += len(possible) - len(candidates)
    random.Random(str(seed)).shuffle(candidates)
    uses = {judged.answer: 0 for judged in answers}
    kept: list[Pair] = []
    while candidates and len(kept) < most:
        best = min(
            candidates, key=lambda pair: (uses[pair.chosen.answer] + uses[pair.rejected.answer], abs(pair.longer))
        )
        candidates.remove(best)
        kept.append(best)
        uses[best.chosen.answer] += 1
        uses[best.rejected.answer] += 1
    left_out.max_pairs_per_prompt += len(candidates)
    return kept


def balanced(pairs: Sequence[Pair], left_out: LeftOut) -> list[Pair]:
    """As many pairs with a longer as with a shorter chosen answer: of the surplus those that differ most in length are
    left out. Pairs of equal lengths are kept."""
    ordered = sorted(range(len(pairs)), key=lambda place: abs(pairs[place].longer))
    longer, shorter = ([place for place in ordered if pairs[place].longer * sign > 0] for sign in (1, -1))
    few = min(len(longer), len(shorter))
    dropped = {*longer[few:], *shorter[few:]}
    left_out.balance_lengths += len(dropped)
    return [pair for place, pair in enumerate(pairs) if place not in dropped]


def best_of(answers: Sequence[Judged]) -> Judged | None:
    """The answer with the highest reward, the first of several; none where rules judged the answers and none is
    right."""
    candidates = [judged for judged in answers if judged.right is not False]
    return max(candidates, key=lambda judged: judged.reward, default=None)
