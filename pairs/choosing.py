"""Chooses pairs of better and worse answers to a prompt. Pure functions; imports no torch."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import permutations


@dataclass(frozen=True)
class Judged:
    """A judged answer. row, answer: the numbers of its prompt and of the answer among those to the prompt. reward: the
    weighted sum of its rewards. right: whether every rule gave it 1; None if no rule judged it."""

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
        """By how many characters the chosen answer is longer than the rejected one."""
        return len(self.chosen.text) - len(self.rejected.text)


@dataclass
class LeftOut:
    """Numbers of pairs left out, by reason."""

    min_margin: int = 0
    max_pairs_per_prompt: int = 0
    duplicates: int = 0
    balance_lengths: int = field(default=0)


def distinct(answers: Iterable[Judged]) -> list[Judged]:
    """The answers to a prompt, without repetitions of an earlier text."""
    return list({judged.text: judged for judged in reversed(list(answers))}.values())[::-1]


def pairs_of(answers: Sequence[Judged], *, most: int, min_margin: float, seed: object, left_out: LeftOut) -> list[Pair]:
    """At most `most` pairs of distinct answers to one prompt, preferring answers used in the fewest pairs so far, then
    answers of similar length; `seed` breaks ties. Counts pairs left out in `left_out`."""
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
    """Equally many pairs whose chosen answer is the longer and the shorter one: of the more frequent kind, the pairs
    with the largest differences in length are left out. Pairs of equal length are kept."""
    ordered = sorted(range(len(pairs)), key=lambda place: abs(pairs[place].longer))
    longer, shorter = ([place for place in ordered if pairs[place].longer * sign > 0] for sign in (1, -1))
    smaller = min(len(longer), len(shorter))
    dropped = {*longer[smaller:], *shorter[smaller:]}
    left_out.balance_lengths += len(dropped)
    return [pair for place, pair in enumerate(pairs) if place not in dropped]


def best_of(answers: Sequence[Judged]) -> Judged | None:
    """The answer with the highest reward, the first one in case of a tie; None if every answer was judged wrong."""
    candidates = [judged for judged in answers if judged.right is not False]
    return max(candidates, key=lambda judged: judged.reward, default=None)
