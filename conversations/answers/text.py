"""Splits text into sentences, and removes what is not prose."""

import math
import re
from functools import lru_cache

import regex  # re has no timeout

from conversations.answers.verdict import shown
from conversations.errors import ToolkitError

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.DOTALL)
_FORMULA = re.compile(
    r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)|(?<![\\\d])\$[^$\n]+\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\boxed\{[^{}]*\}"
    r"|\\[A-Za-z]+(?:\{[^{}]*\})*",
    re.DOTALL,
)
_ADDRESS = re.compile(r"https?://\S+|(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}\.\w{2,}|<[^<>\s][^<>]*>")

MOST_SECONDS = 2.0  # time limit for matching a recipe's pattern against one text
LARGEST = 1_000_000  # limit on the parts of a recipe's pattern, with its counted repeats expanded
_GROUP_REPEATED = re.compile(r"\)\{(\d{1,9})")
_REPEATED = re.compile(r"(?<!\))\{(\d{1,9})")


def sentences(text: str) -> list[str]:
    """The sentences of an English or Chinese text, without empty ones."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def prose(text: str) -> str:
    """The text without code, formulas, addresses and tags."""
    for pattern in (_CODE, _FORMULA, _ADDRESS):
        text = pattern.sub(" ", text)
    return text


@lru_cache(maxsize=64)
def compiled(patterns: tuple[str, ...], kind: str, flags: int = 0) -> tuple[regex.Pattern[str], ...]:
    """The patterns of a recipe, compiled. kind: what they are, for the message.

    Raises:
        ToolkitError: one is not a regular expression, or is too large with its repeats expanded.
    """
    return tuple(_compiled(pattern, kind, flags) for pattern in patterns)


def _compiled(pattern: str, kind: str, flags: int) -> regex.Pattern[str]:
    groups = [int(count) for count in _GROUP_REPEATED.findall(pattern)]
    size = math.prod(filter(None, groups)) * (len(pattern) + sum(map(int, _REPEATED.findall(pattern))))
    if size > LARGEST:  # compiling expands (a{1000}){1000}
        raise ToolkitError(f"{kind} {shown(pattern)} repeats too much: {size:,} parts, at most {LARGEST:,} are allowed")
    try:
        return regex.compile(pattern, flags)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise ToolkitError(f"{kind} {shown(pattern)} is not a regular expression: {error}") from None


def matches(pattern: regex.Pattern[str], text: str, *, whole: bool = False) -> bool:
    """Whether a pattern of a recipe matches somewhere in the text, or the whole of it.

    Raises:
        ToolkitError: it takes longer than MOST_SECONDS: nested repeats such as (a+)+ try every way to split a text.
    """
    try:
        return (pattern.fullmatch if whole else pattern.search)(text, timeout=MOST_SECONDS) is not None
    except TimeoutError:
        raise ToolkitError(
            f"the pattern {shown(pattern.pattern)} took more than {MOST_SECONDS:g} s, the limit, on a text "
            f"of {len(text):,} characters; write it without nested repeats"
        ) from None
