"""The demo's products of two numbers: more than its model can compute, but not more than a calculator can."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from conversations.formats.tools import calls_text, result_text
from conversations.row import Row
from recipes.tiny.lexicon import ARITHMETIC_TEMPLATES

# A short offer in place of the environment's own, which takes most of the model's 512 positions.
OFFER = "<tools>calculate(expression)</tools>"
NUMBERS = range(11, 100)
CALLING = 0.45  # share of labels that use the calculator; the others state the result, as if it had been in the head
TEMPLATES = ARITHMETIC_TEMPLATES["en"]


@dataclass(frozen=True)
class Product:
    """A problem: the two numbers, and its wording."""

    a: int
    b: int
    template: str

    def row(self, answer: list[Row]) -> Row:
        """The problem with the turns of an answer."""
        question = {"role": "user", "content": self.template.format(a=self.a, op="*", b=self.b)}
        messages = [{"role": "system", "content": OFFER}, question, *answer]
        return {"messages": messages, "kind": "product", "language": "en", "reference": self.reference}

    @property
    def reference(self) -> str:
        return str(self.a * self.b)


def products(rng: random.Random, in_part: Callable[[tuple[int, str, int]], bool]) -> Iterator[Product]:
    """All problems of a part once, in random order: each in one wording, then in the next."""
    pool = [(a, b) for a, b in product(NUMBERS, NUMBERS) if in_part((a, "*", b))]
    rng.shuffle(pool)
    offsets = [rng.randrange(len(TEMPLATES)) for _ in pool]
    for turn in range(len(TEMPLATES)):
        for (a, b), offset in zip(pool, offsets, strict=True):
            yield Product(a, b, TEMPLATES[(offset + turn) % len(TEMPLATES)])


def asked(rng: random.Random, problem: Product) -> Row:
    """The problem alone."""
    return problem.row([])


def labelled(rng: random.Random, problem: Product) -> Row:
    """The problem with the right answer, with or without the calculator."""
    calls: list[Row] = []
    if rng.random() < CALLING:
        call = {"name": "calculate", "arguments": {"expression": f"{problem.a} * {problem.b}"}}
        calls = [
            {"role": "assistant", "content": calls_text(call, "call")[0]},
            {"role": "user", "content": result_text(problem.reference)},
        ]
    return problem.row([*calls, {"role": "assistant", "content": f"Sure, the answer is {problem.reference}."}])
