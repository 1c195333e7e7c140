"""Parses a normalised answer into a value: a number, a list, an interval, a matrix, a quantity with its unit, ..."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from conversations.answers.notation import closing_brace, formula, unwrapped, without_thousands
from conversations.answers.numerals import Number, read_number
from conversations.answers.units import canonical_unit, is_known_unit

MAX_LENGTH = 1_000  # characters; longer texts are parsed as numbers or words only
MAX_DEPTH = 8  # deeper nested brackets are not parsed


@dataclass(frozen=True)
class Leaf:
    """An expression, equation or inequality: math-verify compares it."""

    text: str


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Choice:
    """A letter of a multiple choice, with the text after it."""

    text: str
    letter: str
    content: "Value | None" = None


@dataclass(frozen=True)
class Named:
    """x = 5, f(x) = x^2, x in [1, 2)."""

    text: str
    name: str
    value: "Value"


@dataclass(frozen=True)
class Quantity:
    text: str
    value: "Value"
    unit: str


@dataclass(frozen=True)
class Many:
    """Several values. kind: "set" or "union" (no order), or the brackets of a pair or an interval: "()", "[)"."""

    text: str
    kind: str
    items: tuple["Value", ...]


@dataclass(frozen=True)
class Matrix:
    text: str
    rows: tuple[tuple["Value", ...], ...]


@dataclass(frozen=True)
class Colon:
    """A ratio 3:4 or a time 3:45; half: "am", "pm" or ""."""

    text: str
    parts: tuple["Value", ...]
    half: str = ""


@dataclass(frozen=True)
class InBase:
    """Digits in a base other than ten: 1011_2."""

    text: str
    digits: str
    base: int


Value: TypeAlias = Leaf | Words | Choice | Named | Quantity | Many | Matrix | Colon | InBase | Number

_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln lg exp det max min gcd lcm mod sqrt"
_PLAIN = (
    (re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])(?:pi|Pi|PI)(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\])(?:inf|infty|infinity)(?![A-Za-z])"), r"\\infty "),
    (re.compile(rf"(?<![A-Za-z\\])({_FUNCTIONS.replace(' ', '|')})(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"(?<=\d)\s*(?:\*|\bx\b|X)\s*(?=\d)"), r"\\times "),
)
_CHOICE = re.compile(r"(?:\\text\{\s*)?\(?\s*([A-J])\s*\)?\s*[.:)]?\s*\}?")
_NO_LIST = r"(?!\s*(?:and|or|\\text\{\s*(?:and|or)|[,;&和或与及])(?![a-z]))"
_CHOICE_WITH_CONTENT = re.compile(
    rf"(?:\(([A-J])\)|\\text\{{\s*\(([A-J])\)\s*\}}|([A-J])[.:)])\s+{_NO_LIST}(.+)|\(([A-J])\){_NO_LIST}(\S.*)"
)
_JOINT = re.compile(
    r"(?:\s*[,;]\s*)?(?:\\text\{\s*(?:,\s*)?(?:and|or)\s*\}"
    r"|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|[和或与及])|[,;]"
)
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|[<>]")
_NAME = re.compile(
    r"(?:\\?[A-Za-z]+(?:_(?:\w|\{[^{}]*\}))?'*(?:\^\{-1\})?(?:\([A-Za-z, ]*\))?"
    r"|\\frac\{d\w?\}\{d\w\}|\\text\{[^{}]*\}|\|[A-Z]{2}\||\\angle\s*[A-Z]+"
    r"|\\(?:overline|vec|hat|bar)\{[^{}]*\}|[A-Za-z一-鿿][A-Za-z一-鿿 ]*)"
)
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_BASE = re.compile(
    r"(?:\\text\{)?\(?([0-9A-F]+)\)?\}?\s*(?:_\s*(?:\{\s*\(?(?:\\text\{)?|\(?)|(?:\\text\{)?\s*\(?(?:in\s+)?base\s+)"
    r"([0-9]+|[a-z]+)[)}\s]*"
)
_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "sixteen": 16,
}  # fmt: skip
_HALF = re.compile(r"\s*(?:\\text\{\s*)?([ap])\.?\s*m\.?\s*\}?$", re.IGNORECASE)
_RATIO_WORDS = re.compile(r"(\d+)\s*(?:to|比)\s*(\d+)")
_SET_BUILDER = re.compile(r"\\\{\s*[A-Za-z]\s*(?:\\mid|\\vert|\\\||\||:)(?![A-Za-z])\s*(.+)\\\}")
_CURRENCY = re.compile(r"(-?)\s*(?:US)?(\\?\$|[€£¥])\s*(-?.+)")
_WITH_UNIT = (
    re.compile(r"(.+?)\s*(\\?%|\^\s*\\circ(?:\s*(?:\\text\{)?\s*[CF]\s*\}?)?)"),
    re.compile(r"(.*[^\s\\])\s*(\\text\{[^{}]+\}(?:\s*(?:\^\s*\{?[23]\}?|/\s*\\text\{[^{}]+\}(?:\^\{?[23]\}?)?))*)"),
)
_WITH_WORD = re.compile(r"(.*[\d})\]])(\s*)([A-Za-z一-鿿$€£¥¢][A-Za-z一-鿿./ ]*(?:\^\s*\{?[23]\}?)?)")
_PART_OF_COMPOUND = re.compile(r"(\d+(?:\.\d+)?)\s*(?:\\text\{\s*)?([A-Za-z一-鿿]+)\s*\}?")
_COMPOUND = re.compile(rf"(?:{_PART_OF_COMPOUND.pattern}\s*(?:,?\s*(?:and\b|\\text\{{\s*and\s*\}})|[,零])?\s*){{2,}}")
_PROSE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}(?![A-Za-z])|[一-鿿]")
_ENCLOSED = {"(": ")", "[": "]"}


@lru_cache(maxsize=4096)
def value_of(text: str) -> Value:
    """The value of an answer's text; a Leaf if no other kind fits."""
    if len(text) > MAX_LENGTH:
        return read_number(text.strip()) or Words(text)
    text = formula(text)
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return _parse(text, 0)


def _parse(text: str, depth: int) -> Value:
    text = unwrapped(text)
    if text.startswith("\\text{") and closing_brace(text, 5) == len(text) - 1:
        text = unwrapped(text[6:-1])
    if not re.search(r"[(\[]", text):
        text = without_thousands(text)
    if depth < MAX_DEPTH:
        for reader in READERS:
            value = reader(text, depth + 1)
            if value is not None:
                return value
    return Leaf(text)


def _choice(text: str, depth: int) -> Value | None:
    match = _CHOICE.fullmatch(text)
    if match:
        return Choice(text, match[1])
    match = _CHOICE_WITH_CONTENT.fullmatch(text)
    if not match:
        return None
    letter, content = match[1] or match[2] or match[3] or match[5], match[4] or match[6]
    return Choice(text, letter, _parse(content, depth))


def _number(text: str, depth: int) -> Value | None:
    return read_number(text)


def _union(text: str, depth: int) -> Value | None:
    parts = split_outside(text, re.compile(r"\\cup(?![A-Za-z])"))
    return Many(text, "union", tuple(_parse(part, depth) for part in parts)) if len(parts) > 1 else None


def _plus_minus(text: str, depth: int) -> Value | None:
    if not re.search(r"\\pm(?![A-Za-z])", text) or len(split_outside(text, _JOINT)) > 1:
        return None
    signs = (("+", "-"), ("-", "+"))
    variants = (re.sub(r"\\mp\s*", mp, re.sub(r"\\pm\s*", pm, text)) for pm, mp in signs)
    return Many(text, "set", tuple(_parse(re.sub(r"^\+|(?<==)\s*\+", "", variant), depth) for variant in variants))


def _listing(text: str, depth: int) -> Value | None:
    parts = [part for part in split_outside(text, _JOINT) if part.strip()]
    return Many(text, "set", tuple(_parse(part, depth) for part in parts)) if len(parts) > 1 else None


def _equation(text: str, depth: int) -> Value | None:
    member = split_outside(text, re.compile(r"\\in(?![A-Za-z])"))
    parts = [p.strip() for p in (member if len(member) == 2 else split_outside(text, re.compile("=")))]
    if len(parts) < 2 or not all(parts):
        return None
    if _NAME.fullmatch(parts[0]):
        return Named(text, parts[0], _parse(parts[-1], depth))
    return Leaf(text) if any(map(_has_variable, parts[:-1])) else _parse(parts[-1], depth)


def _has_variable(text: str) -> bool:
    return bool(re.search("[A-Za-z]", re.sub(r"\\text\{[^{}]*\}|\\[A-Za-z]+", " ", text)))


def _relation(text: str, depth: int) -> Value | None:
    return Leaf(text) if len(split_outside(text, _RELATION)) > 1 else None


def _matrix(text: str, depth: int) -> Value | None:
    match = _MATRIX.fullmatch(text)
    if not match or "\\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![A-Za-z])", match[2]) if row.strip()]
    return Matrix(text, tuple(tuple(_parse(cell, depth) for cell in row.split("&")) for row in rows))


def _bracketed(text: str, depth: int) -> Value | None:
    match = _SET_BUILDER.fullmatch(text)
    if match:
        return _parse(match[1], depth)
    opening = "\\{" if text.startswith("\\{") else text[:1]
    closing = "\\}" if text.endswith("\\}") else text[-1:]
    inner = text[len(opening) : len(text) - len(closing)]
    is_set = (opening, closing) == ("\\{", "\\}") or (opening + closing == "{}" and "," in inner)
    if is_set and _depth_stays_positive(inner):
        items = [part for part in split_outside(inner, re.compile("[,;]")) if part.strip()]
        return Many(text, "set", tuple(_parse(item, depth) for item in items)) if items else Leaf("\\emptyset ")
    if opening not in _ENCLOSED or closing not in _ENCLOSED.values() or not _depth_stays_positive(inner):
        return None
    items = split_outside(inner, re.compile("[,;]"))
    if len(items) == 1:
        return _parse(inner, depth) if _ENCLOSED[opening] == closing and inner.strip() else None
    return Many(text, opening + closing, tuple(_parse(item, depth) for item in items))


def _colon(text: str, depth: int) -> Value | None:
    match = _RATIO_WORDS.fullmatch(text)
    half = _HALF.search(text)
    body = f"{match[1]}:{match[2]}" if match else text[: half.start()] if half else text
    parts = split_outside(body, re.compile(":"))
    if half and re.fullmatch(r"\d{1,2}", body.strip()):
        parts = [body, "0"]
    if len(parts) < 2 or any(not part.strip() or _PROSE.search(part) for part in parts):
        return None
    return Colon(text, tuple(_parse(part, depth) for part in parts), half[1].lower() + "m" if half else "")


def _in_base(text: str, depth: int) -> Value | None:
    match = _BASE.fullmatch(text)
    base = int(match[2]) if match and match[2].isdigit() else _BASES.get(match[2], 0) if match else 0
    if not match or not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in match[1]):
        return None
    return InBase(text, match[1].lstrip("0") or "0", base)


def _quantity(text: str, depth: int) -> Value | None:
    match = _CURRENCY.fullmatch(text)
    if match and re.match(r"-?[\d.\\(]", match[3]):
        return Quantity(text, _parse(match[1] + match[3], depth), canonical_unit(match[2]))
    for pattern in _WITH_UNIT:
        match = pattern.fullmatch(text)
        if match and not re.search(r"[=,+\-*/^_]\s*$", match[1]):
            return Quantity(text, _parse(match[1], depth), canonical_unit(match[2]))
    match = _WITH_WORD.fullmatch(text)
    if not match or "\\text" in text:
        return None
    value, space, unit = match.groups()
    is_known, is_word = is_known_unit(unit), len(re.sub("[^A-Za-z一-鿿]", "", unit)) > 2 or not unit.isascii()
    if (is_known and (space or is_word or len(unit.strip()) > 1)) or (is_word and (space or not unit.isascii())):
        inner = _parse(value, depth)
        return None if isinstance(inner, Words) else Quantity(text, inner, canonical_unit(unit))
    return None


def _compound(text: str, depth: int) -> Value | None:
    """4 hours 20 minutes, 5 feet 3 inches"""
    parts = _PART_OF_COMPOUND.findall(text)
    if len(parts) < 2 or not _COMPOUND.fullmatch(text) or not all(is_known_unit(unit) for _, unit in parts):
        return None
    items = (Quantity(f"{value} {unit}", _parse(value, depth), canonical_unit(unit)) for value, unit in parts)
    return Many(text, "compound", tuple(items))


def _words(text: str, depth: int) -> Value | None:
    only_text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    letters_alone = re.fullmatch(r"[A-Za-z'\- .]*[A-Za-z]{2}[A-Za-z'\- .]*", only_text)
    prose = _PROSE.search(re.sub(r"\\[A-Za-z]+", " ", only_text)) and (" " in only_text or not only_text.isascii())
    return Words(only_text) if letters_alone or prose else None


# Tried in this order; a reader returns None for what it does not recognise.
READERS: tuple[Callable[[str, int], Value | None], ...] = (
    _choice, _number, _matrix, _bracketed, _union, _compound, _plus_minus, _listing, _equation, _relation, _colon,
    _in_base, _quantity, _words,
)  # fmt: skip


def _depth_stays_positive(inner: str) -> bool:
    """Whether the text was inside one pair of brackets, not `(a)(b)` or `(1,2] \\cup [3,4)`; half-open brackets
    match."""
    depth = 0
    for token in re.findall(r"\\[{}]|\\.|[()\[\]{}]", inner):
        depth += 1 if token in ("(", "[", "{", "\\{") else -1 if token in (")", "]", "}", "\\}") else 0
        if depth < 0:
            return False
    return depth == 0


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """Splits at separators outside all brackets, braces, environments and \\text."""
    parts, start, i, depth = [], 0, 0, 0
    while i < len(text):
        match = separator.match(text, i) if depth == 0 else None
        if match and match.end() > i:
            parts.append(text[start:i])
            start = i = match.end()
            continue
        if text.startswith("\\text{", i):
            end = closing_brace(text, i + 5)
            i = end + 1 if end > 0 else len(text)
            continue
        if text.startswith(("\\begin{", "\\end{"), i):
            depth += 1 if text[i + 1] == "b" else -1
            i += 5
            continue
        if text[i] == "\\":
            depth += {"{": 1, "}": -1}.get(text[i + 1 : i + 2], 0)
            i += 2
            continue
        depth += 1 if text[i] in "([{" else -1 if text[i] in ")]}" else 0
        depth = max(depth, 0)
        i += 1
    return [*parts, text[start:]]
