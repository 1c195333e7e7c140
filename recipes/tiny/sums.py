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
class Answer:
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


def wrong(rng: random.Random, answer: Answer) -> Answer:
    """A right answer made wrong the way models err: a slip in the working and its consequences, or a nearby number."""
    if answer.steps is None:
        return Answer(wrong_number(rng, int(answer.number)))
    steps = slipped(rng, answer.steps)
    return Answer(steps.result, steps)


def all_wrong(rng: random.Random, answer: Answer) -> Answer:
    """An answer that is wrong in every step of its working."""
    assert answer.steps
    ones, tens = ((digit + rng.randrange(1, 10)) % 10 for digit in (answer.steps.ones, answer.steps.tens))
    steps = Steps(ones, 1 - answer.steps.carry, tens)
    return Answer(steps.result, steps)


def slipped(rng: random.Random, steps: Steps) -> Steps:
    """Working with one slip that changes the result: in the ones, in the carry and what follows, or in the tens."""
    flipped = 1 - 2 * steps.carry
    slips = [replace(steps, ones=(steps.ones + step) % 10) for step in (-2, -1, 1, 2)]
    slips += [replace(steps, tens=steps.tens + step) for step in (-1, 1)]
    slips += [replace(steps, carry=1 - steps.carry, tens=steps.tens + step) for step in (-flipped, flipped)]
    return rng.choice([slip for slip in slips if 0 <= slip.tens <= 9])


def wrong_number(rng: random.Random, right: int) -> str:
    """A number near the right one: wrong in the last digit, by a carry, or at random."""
    near = {right + step for step in (-11, -10, -9, -2, -1, 1, 2, 9, 10, 11)} | {rng.randrange(LARGEST_NUMBER + 1)}
    return str(rng.choice(sorted(number for number in near if number >= 0 and number != right)))


def choose(rng: random.Random, shares: dict[str, int]) -> str:
    """Choose one of the names at random, weighted by its share."""
    return rng.choices(list(shares), list(shares.values()))[0]


def guess(rng: random.Random, right: int) -> str:
    """A wrong guess: in four of ten only the tens are wrong, in two of ten it is off by 1 or 2."""
    numbers = range(LARGEST_NUMBER + 1)
    tens = [number for number in numbers if number % 10 == right % 10]
    near = [number for number in numbers if abs(number - right) <= 2]
    pool = rng.choices((tens, near, numbers), (4, 2, 4))[0]
    return str(rng.choice([number for number in pool if number != right]))


def slip_of_policy(rng: random.Random, answer: Answer) -> Answer:
    """Working with a slip where the policy of stage 1 makes them (SLIPS), and its consequences."""
    assert answer.steps
    where, steps = choose(rng, SLIPS), answer.steps
    if where == "all":
        return all_wrong(rng, answer)
    if where == "ones":
        steps = replace(steps, ones=(steps.ones + rng.choice((-2, -1, 1, 2))) % 10)
    else:
        near = [tens for tens in (steps.tens - 1, steps.tens + 1) if 0 <= tens <= 9]
        other_tens = [tens for tens in range(10) if tens != steps.tens]
        carry = 1 - steps.carry if where == "carry" else steps.carry
        steps = replace(steps, carry=carry, tens=rng.choice(rng.choice((near, other_tens))))
    return Answer(steps.result, steps)


def broken(rng: random.Random, text: str, foreign: str, reference: str) -> str:
    """A right answer with a piece lost, doubled or replaced by one of `foreign`, so that the rule `number` rejects
    it."""
    while True:
        pieces, instead = _PIECE.findall(text), rng.choice((*_PIECE.findall(foreign), *"0123456789"))
        at = rng.randrange(len(pieces))
        pieces[at : at + 1] = rng.choice(([], [pieces[at]] * 2, [instead], [pieces[at], instead]))
        if (joined := "".join(pieces)) and verify("number", joined, reference=reference).score == 0:
            return joined
