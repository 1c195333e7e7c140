"""Parses written numbers: 1,234  -.5  2 2/3  \\frac{1}{2}  1.5e3  1.5 \\times 10^3  10^6  0.\\overline{3}."""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

MAX_DIGITS = 20_000  # longer numbers are compared as text
_NUM = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SIGNED = rf"[+-]?\s*{_NUM}"
_FRACTION = rf"\\frac\s*\{{\s*({_SIGNED})\s*\}}\s*\{{\s*({_SIGNED})\s*\}}"
_FORMS = {
    "plain": rf"({_NUM})",
    "fraction": rf"(?:{_FRACTION}|({_NUM})\s*/\s*({_NUM})|\(\s*({_NUM})\s*\)\s*/\s*\(\s*({_NUM})\s*\))",
    "mixed": r"(\d+)(?:\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\})|(?:\s+and)?\s+(\d+)\s*/\s*(\d+))",
    "scientific": rf"({_NUM})\s*(?:[eE]([+-]?\d+)|(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?\s*([+-]?\d+)\s*\}}?)",
    "power": rf"({_NUM})\s*\^\s*\{{?\s*([+-]?\d+)\s*\}}?",
    "repeating": r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}",
}
_READ = {name: re.compile(rf"([+-]?)\s*{form}") for name, form in _FORMS.items()}


@dataclass(frozen=True)
class Number:
    """decimals: the number of digits after the decimal point; None without a point."""

    text: str
    value: Fraction
    decimals: int | None = None


def read_number(text: str) -> Number | None:
    """Parses a text that is a number and nothing else; None for any other text, or more than MAX_DIGITS digits."""
    if len(text) > MAX_DIGITS:
        return None
    for name, pattern in _READ.items():
        match = pattern.fullmatch(text)
        if match:
            sign, *groups = match.groups()
            value = _value(name, [group.replace(" ", "") for group in groups if group is not None])
            if value is None:
                return None
            decimals = len(text.partition(".")[2]) if name == "plain" and "." in text else None
            return Number(text, -value if sign == "-" else value, decimals)
    return None


def _value(form: str, groups: list[str]) -> Fraction | None:
    """The value; None for a division by zero, or more than MAX_DIGITS digits."""
    if form == "repeating":
        return _repeating(*groups)
    first = exact(groups[0])
    if form == "plain":
        return first
    if form in ("scientific", "power"):
        base, exponent = (Fraction(10), groups[1]) if form == "scientific" else (first, groups[1])
        if len(exponent) > 6 or abs(int(exponent)) * len(groups[0]) > MAX_DIGITS or (not base and int(exponent) < 0):
            return None
        return (first if form == "scientific" else 1) * base ** int(exponent)
    upper, lower = (exact(part) for part in groups[-2:])
    if not lower:
        return None
    return first + upper / lower if form == "mixed" else upper / lower


def _repeating(integer: str, fixed: str, repeated: str) -> Fraction:
    shift = 10 ** len(fixed)
    return Fraction(int(integer + fixed or 0), shift) + Fraction(int(repeated), shift * (10 ** len(repeated) - 1))


def exact(digits: str) -> Fraction:
    """An integer of any length: int() refuses more than 4,300 digits."""
    return Fraction(Decimal(digits))


def equal_numbers(a: Number, b: Number) -> bool:
    """Whether two numbers are equal: exactly, or to six places if one is a decimal and the other a fraction (0.333333
    for 1/3)."""
    if a.value == b.value:
        return True
    written_out = {a.decimals is None, b.decimals is None} == {True, False}
    whole = 1 in (a.value.denominator, b.value.denominator)
    if written_out and not whole and max(a.decimals or 0, b.decimals or 0) >= 6:
        return abs(a.value - b.value) <= Fraction(1, 10**6) * min(1, max(abs(a.value), abs(b.value)))
    return False
