"""The rule `number`: whether the answer's last number is the reference's."""

import re
from fractions import Fraction
from functools import lru_cache

from conversations.answers.chinese_numerals import with_digits
from conversations.answers.extracting import final_line, last_boxes
from conversations.answers.notation import unified
from conversations.answers.numerals import read_number
from conversations.answers.verdict import Verdict, judged, shown
from conversations.errors import ToolkitError

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMERAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    r"(?P<sign>(?:(?<![0-9A-Za-z_.)\]}%])|(?<=[=:(]\s))[-+]\s?)?(?:\\?\$|[€£¥])?\s?(?P<minus>(?<=[$€£¥])-)?(?P<number>"
    rf"\\[dtc]?frac\{{\s*-?{_NUMERAL}\s*\}}\{{\s*-?{_NUMERAL}\s*\}}"
    rf"|(?<![\d.]){_NUMERAL}\s*(?:\\times|\*)\s*10\s*\^\s*(?:-?\d+|\{{\s*-?\d+\s*\}})"
    rf"|(?<![\d.]){_NUMERAL}[eE][+-]?\d+(?![A-Za-z0-9])"
    rf"|{_NUMERAL}\^(?:-?\d+|\{{\s*-?\d+\s*\}})"
    rf"|(?<![\d/]){_DIGITS}\s\d+/\d+(?![\d/])|(?<![\d/.])\d+/\d+(?![\d/])"
    rf"|{_NUMERAL})(?<!\^)"
)
_RAISED_OR_LOWERED = re.compile(r"(?<=[A-Za-z)\]}一-鿿])\s*[\^_]\s*(?:\{[^{}]*\}|[-+]?\w+)|\\circ|\\text\{[^{}]*\}")


def last_number(text: str) -> Fraction | None:
    """The last number of a text: 1,234  -5  −5  -$50  1/2  2 1/2  .5  10^6  1.5e3  \\frac{1}{2}.

    "10-3" ends in 3, not in -3; the 2 of m^2 is not a number of its own.
    """
    text = unified(text).replace("{,}", ",").replace("\\!", "")
    text = _RAISED_OR_LOWERED.sub(" ", text)
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    number = read_number(re.sub(r"\\[dtc]frac", r"\\frac", matches[-1]["number"].replace(",", "")))
    negative = (matches[-1]["sign"] or matches[-1]["minus"] or "").strip() == "-"
    return None if number is None else -number.value if negative else number.value


def final_number(text: str) -> Fraction | None:
    """The number after a last "####", otherwise in the last \\boxed, otherwise the last one in the text; also Chinese
    numerals."""
    text = with_digits(text)
    for place in (final_line(text), last_boxes(text), text):
        last = last_number(place) if place else None
        if last is not None:
            return last
    return None


@lru_cache(maxsize=4096)
def number_reference(reference: str) -> int:
    """The integer at the end of a reference.

    Raises:
        ToolkitError: it does not end in one.
    """
    value = final_number(reference)
    if value is None or value.denominator != 1:
        raise ToolkitError(
            f"the reference {shown(reference)} does not end in a whole number; use the rule math, or fix the data"
        )
    return value.numerator


def number(completion: str, *, reference: str) -> Verdict:
    """1 if the last number of the answer equals the last number of the reference, an integer.

    Raises:
        ToolkitError: the reference does not end in a whole number.
    """
    target, last = number_reference(reference), final_number(completion)
    if last is None:
        return judged(False, "the answer contains no number")
    if last == target:
        return judged(True, f"the last number is the reference {shown(reference)}")
    return judged(False, f"the last number is not the reference {shown(reference)}")
