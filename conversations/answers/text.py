"""Prose: its sentences, and text without what is not prose."""

import re
from functools import lru_cache

from conversations.errors import ToolkitError

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.DOTALL)
_FORMULA = re.compile(
    r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)|(?<![\\\d])\$[^$\n]+\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\boxed\{[^{}]*\}"
    r"|\\[A-Za-z]+(?:\{[^{}]*\})*",
    re.DOTALL,
)
_ADDRESS = re.compile(r"https?://\S+|(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}\.\w{2,}|<[^<>\s][^<>]*>")


def sentences(text: str) -> list[str]:
    """The sentences of an English or Chinese text, without blank ones."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def prose(text: str) -> str:
    """A text without code, formulas, addresses and tags."""
    for pattern in (_CODE, _FORMULA, _ADDRESS):
        text = pattern.sub(" ", text)
    return text


@lru_cache(maxsize=64)
def compiled(patterns: tuple[str, ...], kind: str, flags: re.RegexFlag = re.NOFLAG) -> tuple[re.Pattern[str], ...]:
    """The patterns, compiled; raises ToolkitError for one that is not a regular expression. kind: for the message."""
    found = []
    for pattern in patterns:
        try:
            found.append(re.compile(pattern, flags))
        except re.error as error:
            raise ToolkitError(f"{kind} pattern {pattern!r} is not a regular expression: {error}") from None
    return tuple(found)
