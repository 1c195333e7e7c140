"""Rows of a task that training data contain: those that share 13 consecutive words with it (Brown et al. 2020)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import regex

from conversations.reading.records import raw_rows

GRAM = 13  # words; Chinese characters count as words
_WORD = regex.compile(r"\p{Han}|[^\W_\p{Han}]+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case; each Chinese character is one."""
    return _WORD.findall(text.lower())


def contaminated(rows: Sequence[Any], files: Iterable[str]) -> set[int]:
    """The numbers of the rows of which any text shares GRAM consecutive words with a row of these files; of a row of
    shorter texts all of the longest one must stand there. Memory grows with the rows, not with the files.

    Raises:
        ToolkitError: a file is missing or cannot be read.
    """
    holders: dict[tuple[str, ...], set[int]] = {}
    for number, row in enumerate(rows):
        for gram in _telling(row):
            holders.setdefault(gram, set()).add(number)
    sizes = {len(gram) for gram in holders}
    found: set[int] = set()
    for file in files:
        for _, trained in raw_rows(Path(file)):
            for text in _strings(trained):
                listed = words(text)
                for gram in (gram for size in sizes for gram in _grams(listed, size)):
                    found |= holders.get(gram, set())
    return found


def _telling(row: Any) -> Iterator[tuple[str, ...]]:
    """The runs of words by which a row is recognised."""
    texts = [words(text) for text in _strings(row)]
    long = [text for text in texts if len(text) >= GRAM]
    for text in long or [max(texts, key=len, default=[])]:
        yield from _grams(text, min(GRAM, len(text)))


def _grams(listed: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """Every run of `size` words."""
    if size:
        for start in range(len(listed) - size + 1):
            yield tuple(listed[start : start + size])


def _strings(value: Any) -> Iterator[str]:
    """All texts in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
