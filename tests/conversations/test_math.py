"""The rule `math` over references of many kinds: each is right for itself however it is said, and for no other."""

import os
import random
from itertools import permutations
from pathlib import Path

import pytest

from conversations import verify

# The second list was written without a look at the rule, and held at once.
LISTS = {
    name: (Path(__file__).parents[1] / "data" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    for name in ("references", "references_more")
}
SHAPES = (
    r"\boxed{%s}", "$%s$", "%s",
    "The answer is %s.", "答案是%s。", "所以结果为 $%s$。", r"We add them and get \boxed{%s}.",
    "Therefore, we get %s.", "因此，我们得到%s。", "**Answer:** %s", "#### %s",
)  # fmt: skip


def score(answer: str, reference: str) -> float | None:
    return verify("math", answer, reference=reference).score


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_reference_is_right_for_itself(shape, name):
    assert len(LISTS[name]) >= 80
    assert [r for r in LISTS[name] if score(shape.replace("%s", r), r) != 1] == []


@pytest.mark.parametrize("name", LISTS)
def test_a_reference_is_wrong_for_every_other(name):
    """A seeded part of all pairs and shapes; DSV2_ALL_PAIRS=1 takes every pair, which takes about 15 seconds of CPU."""
    pairs = list(permutations(LISTS[name], 2))
    if not os.environ.get("DSV2_ALL_PAIRS"):
        pairs = random.Random(0).sample(pairs, 1_500)
    said = [(random.Random(i).choice(SHAPES).replace("%s", a), b) for i, (a, b) in enumerate(pairs)]
    assert [pair for pair in said if score(*pair) != 0] == []


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("The answer is 2.", r"2\sqrt{2}", 0),
        ("So 8/3.", "2 2/3", 1),
        (r"\boxed{{42}}", "42", 1),
        (r"\boxed{42.0000001}", "42", 0),
        (r"\boxed{0.3333333}", "1/3", 1),
        ("x = 5", "5", 1),
        ("5", "x = 5", 1),
        (r"\boxed{(x+1)^2}", "x^2 + 2x + 1", 1),
        (r"\boxed{1} and \boxed{2}", "1, 2", 1),
        (r"\boxed{1}. No, it is \boxed{2}.", "2", 1),
        (r"\boxed{1} or \boxed{2}", "2", 0),
        ("The answer is A.", "B", 0),
        ("I choose option (B).", "B", 1),
        ("48 / 2 = 24, 48 + 24 = 72", "72", 1),
        ("5 m", r"5 \text{ cm}", 0),
        ("$\\frac{1}{2}$", "0.5", 1),
        ("50%", "0.5", 1),
        ("0.5%", "0.5", 0),
        ("0.5", "0.5%", 1),  # and not the same when answer and reference are swapped
        ("no idea", "0.5", 0),
        (".75", r"\frac{3}{4}", 1),
        ("x > 3", r"(3, \infty)", 1),
        ("y = 2x + 3", "2x + 3", 1),
        ("2x + 3 = 9", "9", 0),
        ("So x + y = 10.", "10", 0),
        ("xy = 4", "x = 4", 0),
        ("(a-b)(a+b)", "a^2 - b^2", 1),
        ("y^2 + x^2 = 25", "x^2 + y^2 = 25", 1),
        ("(x+1)^2 = x^2 + 2x + 1", "x^2 + 2x + 1", 1),
        ("We get 30公里。", r"30 \text{ cm}", 0),
        ("We get 30 cents.", r"30 \text{ cm}", 0),
        ("It is 7!", "7", 1),
        ("7!", "7", 0),
        ("The ratio is 3:2.", "2", 0),
        ("It is 5 feet 3 inches.", "3", 0),
        ("(A) and (D)", "A", 0),
        ("A, C", "(C)", 0),
        ("(1, 2, 3)", r"\{1, 2, 3\}", 0),
        (r"\boxed{3, or rather \boxed{2}", "2", 1),
        (r"\frac{5}{18}", r"0.2\overline{7}", 1),
        ("0.333333", r"\frac{1}{3}", 1),
        ("0.33", r"\frac{1}{3}", 0),
        ("100.333333", r"\frac{301}{3}", 1),
        ("100.333433", r"\frac{301}{3}", 0),
        ("3:45 am", r"3:45\text{ p.m.}", 0),
        ("3:45 PM", r"3:45\text{ p.m.}", 1),
        ("60 kilometers/hour", r"60 \text{ km/h}", 1),
    ],
)
def test_answers(answer, reference, wanted):
    assert score(answer, reference) == wanted
