"""The demo's arithmetic problems: answers, worked steps, and mistakes.

Standard library only, except for the rule that tells a broken answer from a right one.
"""

import random
import re
from dataclasses import dataclass, replace

from conversations import verify

Fact = tuple[int, str, int]  # a, "+" or "-", b

LARGEST_NUMBER = 99

_PIECE = re.compile(r"\d|[^\d]+")  # pieces of an answer: a digit, or the text between digits


@dataclass(frozen=True)
class Policy:
    """How the policy of a stage answers held-out problems at temperature 1, over the problems that it gets right and
    wrong by turns, as measured (docs/log.md). In per cent: tones of right and of wrong answers, right answers with
    their working by language, sorts of mistakes."""

    tones: dict[str, int]
    tones_of_wrong: dict[str, int]
    worked: dict[str, int]
    mistakes: dict[str, int]


POLICIES = {
    "sft": Policy(
        tones={"polite": 59, "curt": 22, "rude": 19},
        tones_of_wrong={"polite": 51, "curt": 27, "rude": 22},
        worked={"en": 97, "zh": 37},
        mistakes={"guess": 84, "slip": 5, "other number": 1, "broken": 10},
    ),
    "rl_reasoning": Policy(
        tones={"polite": 84, "curt": 8, "rude": 8},
        tones_of_wrong={"polite": 62, "curt": 26, "rude": 12},
        worked={"en": 100, "zh": 100},
        mistakes={"guess": 13, "slip": 40, "other number": 11, "broken": 36},
    ),
}

# Where working slips (stage 1, the same measurement): in the tens, in the carry with the tens, in the ones, in all.
SLIPS = {"tens": 63, "carry": 15, "ones": 15, "all": 7}


@dataclass(frozen=True)
class Steps:
    """Working, ones first: the ones digit of the result, the carry or borrow (0 or 1), the tens digit."""

    ones: int
    carry: int
    tens: int

    @property
    def result(self) -> str:
        return str(10 * self.tens + self.ones)


@dataclass(frozen=True)
class Said:
    """The content of an answer, independent of its tone: a number, preceded by the steps if they are shown."""

    number: str
    steps: Steps | None = None


def result_of(fact: Fact) -> int:
    """The right answer."""
    a, op, b = fact
    return a + b if op == "+" else a - b


def steps_of(fact: Fact) -> Steps:
    """The steps to the right answer of a problem."""
    a, op, b = fact
    tens, ones = divmod(result_of(fact), 10)
    return Steps(ones, int(a % 10 + b % 10 > 9 if op == "+" else a % 10 < b % 10), tens)


def wrong(rng: random.Random, said: Said) -> Said:
    """A right answer gone wrong, as models err: a slip in the working and what follows, or a number near the right."""
    if said.steps is None:
        return Said(wrong_number(rng, int(said.number)))
    steps = slipped(rng, said.steps)
    return Said(steps.result, steps)


def all_wrong(rng: random.Random, said: Said) -> Said:
    """Wrong in every step of the working."""
    assert said.steps
    ones, tens = ((digit + rng.randrange(1, 10)) % 10 for digit in (said.steps.ones, said.steps.tens))
    steps = Steps(ones, 1 - said.steps.carry, tens)
    return Said(steps.result, steps)


def slipped(rng: random.Random, steps: Steps) -> Steps:
    """Working with one slip that makes the result another one: the ones, the carry with what follows, the tens."""
    flipped = 1 - 2 * steps.carry
    slips = [replace(steps, ones=(steps.ones + step) % 10) for step in (-2, -1, 1, 2)]
    slips += [replace(steps, tens=steps.tens + step) for step in (-1, 1)]
    slips += [replace(steps, carry=1 - steps.carry, tens=steps.tens + step) for step in (-flipped, flipped)]
    return rng.choice([slip for slip in slips if 0 <= slip.tens <= 9])


def wrong_number(rng: random.Random, right: int) -> str:
    """A number near the right one: wrong in the last digit, by a carry, or anywhere."""
    near = {right + step for step in (-11, -10, -9, -2, -1, 1, 2, 9, 10, 11)} | {rng.randrange(LARGEST_NUMBER + 1)}
    return str(rng.choice(sorted(number for number in near if number >= 0 and number != right)))


def choose(rng: random.Random, shares: dict[str, int]) -> str:
    """Choose one of the names at random, weighted by its share."""
    return rng.choices(list(shares), list(shares.values()))[0]


def guess(rng: random.Random, right: int) -> str:
    """A wrong number that was not worked out: in four of ten the tens alone are wrong, in two it is off by 1 or 2."""
    numbers = range(LARGEST_NUMBER + 1)
    tens = [number for number in numbers if number % 10 == right % 10]
    near = [number for number in numbers if abs(number - right) <= 2]
    pool = rng.choices((tens, near, numbers), (4, 2, 4))[0]
    return str(rng.choice([number for number in pool if number != right]))


def slip_of_policy(rng: random.Random, said: Said) -> Said:
    """Working with a slip where that of stage 1 has them (SLIPS), and its consequences."""
    assert said.steps
    where, steps = choose(rng, SLIPS), said.steps
    if where == "all":
        return all_wrong(rng, said)
    if where == "ones":
        steps = replace(steps, ones=(steps.ones + rng.choice((-2, -1, 1, 2))) % 10)
    else:
        near = [tens for tens in (steps.tens - 1, steps.tens + 1) if 0 <= tens <= 9]
        others = [tens for tens in range(10) if tens != steps.tens]
        carry = 1 - steps.carry if where == "carry" else steps.carry
        steps = replace(steps, carry=carry, tens=rng.choice(rng.choice((near, others))))
    return Said(steps.result, steps)


def broken(rng: random.Random, text: str, foreign: str, reference: str) -> str:
    """A right answer that lost, doubled or swapped a piece for one of `foreign`, and is wrong by the rule `number`."""
    while True:
        pieces, instead = _PIECE.findall(text), rng.choice((*_PIECE.findall(foreign), *"0123456789"))
        at = rng.randrange(len(pieces))
        pieces[at : at + 1] = rng.choice(([], [pieces[at]] * 2, [instead], [pieces[at], instead]))
        if (joined := "".join(pieces)) and verify("number", joined, reference=reference).score == 0:
            return joined
