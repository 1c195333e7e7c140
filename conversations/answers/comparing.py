"""Compares an answer's value with the reference's: by kind if it has one, by math-verify if it is an expression."""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from conversations.answers.numerals import Number, equal_numbers
from conversations.answers.values import Choice, Colon, InBase, Leaf, Many, Matrix, Named, Quantity, Value, Words

MATH_SECONDS = 2  # for reading an expression, and for comparing two
MAX_EXPRESSION = 400  # characters; longer ones are compared as text
_MAX_EXPONENT_DIGITS = 3
_EQUALS = re.compile(r"(?<![<>!:])=")
# Numbers whose computation no signal can interrupt: towers of powers, long exponents, large factorials, also as Gamma.
_ENDLESS = re.compile(
    rf"\^\s*\{{?\s*-?\s*\d{{{_MAX_EXPONENT_DIGITS + 1},}}"
    r"|\^\s*-?\w*\d\s*\^|\^\s*[({]\s*[({]?[^{}()^]*\d\s*\^|\^\s*[({]\s*[({][^{}()^]*\d\s*[)}]\s*\^"
    r"|\d{4,}\s*!|!\s*!|\d{4,}\s*\)\s*!"
    r"|\\Gamma[^\d]{0,20}(?:\d{4,}|\d+\s*\^)"
    r"|\\binom\s*\{\s*\d{5,}|\d{400,}|\\(?:sum|prod|int)[^=]*=[^}]*\}\s*\^\s*\{?\s*\d{5,}"
)


def same(gold: Value, answer: Value) -> bool:
    """Whether `answer` is what `gold` asks for. A unit or a name (x = 5) may be missing, but not differ."""
    if compact(gold.text) == compact(answer.text):
        return True
    for kind, compare in COMPARISONS:
        if isinstance(gold, kind) or isinstance(answer, kind):
            return compare(gold, answer)
    if isinstance(gold, Number) and isinstance(answer, Number):
        return equal_numbers(gold, answer)
    return same_expression(gold.text, answer.text)


def compact(text: str) -> str:
    """The text without meaningless spaces and braces; 2 2/3 keeps its space."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=\d) (?=\d)", "\0", text.strip())
    return re.sub(r"(?<![A-Za-z])\{(\w)\}", r"\1", text.replace(" ", "")).replace("\0", " ")


def _same_choice(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Choice) and isinstance(answer, Choice):
        return gold.letter == answer.letter
    if isinstance(gold, Choice):
        return gold.content is not None and same(gold.content, answer)
    return isinstance(answer, Choice) and answer.content is not None and same(gold, answer.content)


def _same_named(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Named) and isinstance(answer, Named):
        if compact(gold.name) != compact(answer.name):
            return same_expression(gold.text, answer.text)
        return same(gold.value, answer.value)
    named, other = (gold, answer) if isinstance(gold, Named) else (answer, gold)
    if isinstance(other, Leaf) and "=" in other.text:
        return same_expression(gold.text, answer.text)
    assert isinstance(named, Named)
    return same(gold, named.value) if named is answer else same(named.value, answer)


def _same_quantity(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Quantity) and isinstance(answer, Quantity):
        return gold.unit == answer.unit and same(gold.value, answer.value)
    quantity, other = (gold, answer) if isinstance(gold, Quantity) else (answer, gold)
    assert isinstance(quantity, Quantity)
    if quantity.unit == "%" and isinstance(quantity.value, Number) and isinstance(other, Number):
        share = Number("", quantity.value.value / 100, (quantity.value.decimals or 0) + 2)
        # A bare reference between -1 and 1 is a share: 0.5 is 50 %, and not 0.5 %.
        is_share = other is gold and abs(other.value) <= 1
        return equal_numbers(share, other) or (not is_share and same(quantity.value, other))
    return same(quantity.value, other) if quantity is gold else same(other, quantity.value)


def _same_base(gold: Value, answer: Value) -> bool:
    if not (isinstance(gold, InBase) and isinstance(answer, InBase)):
        return False
    return (gold.digits, gold.base) == (answer.digits, answer.base)


def _same_colon(gold: Value, answer: Value) -> bool:
    if not (isinstance(gold, Colon) and isinstance(answer, Colon)):
        return False
    return _pairwise(gold.parts, answer.parts) and ("" in (gold.half, answer.half) or gold.half == answer.half)


def _same_matrix(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        rows = zip(gold.rows, answer.rows, strict=False)
        return len(gold.rows) == len(answer.rows) and all(_pairwise(a, b) for a, b in rows)
    return isinstance(answer if isinstance(gold, Matrix) else gold, Leaf) and same_expression(gold.text, answer.text)


def _same_many(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Many) and isinstance(answer, Many):
        if gold.kind != answer.kind:
            return False
        compare = _in_any_order if gold.kind in ("set", "union") else _pairwise
        return compare(gold.items, answer.items)
    many, other = (gold, answer) if isinstance(gold, Many) else (answer, gold)
    assert isinstance(many, Many)
    if many.kind == "set":
        return len(many.items) == 1 and (same(many.items[0], other) if many is gold else same(other, many.items[0]))
    return isinstance(other, Leaf) and same_expression(gold.text, answer.text)  # x > 3 and (3, \infty)


def _pairwise(gold: Sequence[Value], answer: Sequence[Value]) -> bool:
    return len(gold) == len(answer) and all(same(a, b) for a, b in zip(gold, answer, strict=True))


def _in_any_order(gold: Sequence[Value], answer: Sequence[Value]) -> bool:
    if len(gold) != len(answer) or len(gold) > 50:
        return False
    unmatched = list(answer)
    for item in gold:
        place = next((i for i, value in enumerate(unmatched) if same(item, value)), None)
        if place is None:
            return False
        del unmatched[place]
    return True


def _same_words(gold: Value, answer: Value) -> bool:
    return (
        isinstance(gold, (Words, Leaf))
        and isinstance(answer, (Words, Leaf))
        and _plain_words(gold) == _plain_words(answer) != ""
    )


def _plain_words(value: Value) -> str:
    words = re.sub(r"[^\w\s]", "", value.text.lower())
    return re.sub(r"\s+", " ", re.sub(r"\b(?:the|an?)\b", " ", words)).strip()


# The first kind that either value has decides how they are compared.
COMPARISONS: tuple[tuple[type, Callable[[Any, Any], bool]], ...] = (
    (Choice, _same_choice),
    (Named, _same_named),
    (Quantity, _same_quantity),
    (InBase, _same_base),
    (Colon, _same_colon),
    (Words, _same_words),
    (Matrix, _same_matrix),
    (Many, _same_many),
)


# --- expressions


@lru_cache(maxsize=8192)
def same_expression(gold: str, answer: str) -> bool:
    """Whether math-verify finds two expressions equal; one that it cannot read, or not in time, equals nothing."""
    if not _is_readable(gold) or not _is_readable(answer) or _differ_in_letters(gold, answer):
        return False
    sides = [_EQUALS.split(text) for text in (gold, answer)]
    if len(sides[0]) > 1 and len(sides[1]) == 1:
        return False
    if len(sides[1]) > 1 and len(sides[0]) == 1:  # (x + 1)^2 = x^2 + 2x + 1 has a value, x + y = 10 has none
        *before, last = sides[1]
        return all(same_expression(last, side) for side in before) and same_expression(gold, last)
    from math_verify import verify
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    target, candidate = _parsed(gold), _parsed(answer)
    if not target or not candidate or _clearly_differ(_fingerprint(gold), _fingerprint(answer)):
        return False
    try:
        return bool(verify(target, candidate, timeout_seconds=_seconds(), allow_set_relation_comp=True))
    except (Exception, TimeoutException):  # sympy raises all kinds of errors, on all kinds of answers
        return False


@lru_cache(maxsize=8192)
def _parsed(text: str) -> list[Any]:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import parse
    from math_verify.errors import TimeoutException
    from math_verify.parser import LatexExtractionConfig

    plain = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    reading = [LatexExtractionConfig(normalization_config=plain)]
    try:
        return parse(f"${text}$", reading, fallback_mode="no_fallback", parsing_timeout=_seconds())
    except (Exception, TimeoutException):
        return []


@lru_cache(maxsize=8192)
def _fingerprint(text: str) -> tuple[str, Any]:
    """Kind of an expression, with its value at one fixed assignment of its symbols (None if it has no value there).

    Avoids sympy's slow `simplify` for expressions that clearly differ.
    """
    from sympy import Expr, MatrixBase, Set
    from sympy.core.relational import Equality, Relational

    expression = _parsed(text)[0]
    symbols = frozenset(map(str, getattr(expression, "free_symbols", ())))
    if isinstance(expression, Equality):
        return "equation", symbols
    if isinstance(expression, (Relational, Set)) or str(type(expression)) in ("And", "Or"):
        return "range", None
    if isinstance(expression, MatrixBase):
        return "matrix", expression.shape
    if not isinstance(expression, Expr):
        return "other", None
    try:
        numbers: Any = {symbol: _some_number(str(symbol)) for symbol in expression.free_symbols}
        return "number", complex(expression.doit().subs(numbers).evalf(15))
    except Exception:  # infinite, undefined, an unknown function
        return "number", None


def _some_number(symbol: str) -> float:
    return 1.37 + sum((place + 1) * ord(character) for place, character in enumerate(symbol)) % 97 * 0.0131


def _clearly_differ(gold: tuple[str, Any], answer: tuple[str, Any]) -> bool:
    if "other" in (gold[0], answer[0]):
        return False
    if gold[0] != answer[0] or gold[0] in ("equation", "matrix"):
        return gold != answer
    if gold[1] is None or answer[1] is None:
        return False
    return abs(gold[1] - answer[1]) > 1e-3 * max(1e-6, abs(gold[1]), abs(answer[1]))


def _seconds() -> Any:
    """math-verify's time limit uses a signal, which only the main thread can set."""
    return MATH_SECONDS if threading.current_thread() is threading.main_thread() else None


def _is_readable(text: str) -> bool:
    return bool(text.strip()) and len(text) <= MAX_EXPRESSION and "$" not in text and not _ENDLESS.search(text)


def _differ_in_letters(gold: str, answer: str) -> bool:
    """Whether the letters differ: math-verify treats x and X as the same."""
    names = (re.sub(r"\\[A-Za-z]+|\s", "", text) for text in (gold, answer))
    gold_letters, answer_letters = (set(re.findall("[A-Za-z]", text)) for text in names)
    return gold_letters != answer_letters and {c.lower() for c in gold_letters} == {c.lower() for c in answer_letters}
