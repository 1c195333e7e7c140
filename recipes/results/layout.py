"""Tables as data, for HTML pages and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from recipes.results.words import flatten, plain

# Typographic characters of the page, replaced by ASCII in terminal output.
_ASCII = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2192": "->"})


@dataclass(frozen=True)
class Cell:
    """A table cell. `minor` lines appear in smaller type below; `bar` is a share with its interval, drawn on a page;
    `tone` is good, bad or empty."""

    text: str
    minor: tuple[str, ...] = ()
    tone: str = ""
    bar: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Table:
    """`columns` are the headings, the first one for the row headings; `notes` are sentences."""

    title: str
    columns: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()


def plain_cell(value: Any) -> Cell:
    if isinstance(value, dict | list):
        return Cell("; ".join(f"{key} {text}".strip() for key, text in flatten(value)))
    return Cell("–" if value is None else plain(value))


def as_text(table: Table) -> str:
    """The table for a terminal, never wrapped: row headings left-aligned, everything else right-aligned."""
    # Each row takes one line for the main text of its cells, and one for each `minor` line.
    grid = [
        line
        for row in (table.columns, *table.rows)
        for line in zip_longest(*((cell.text, *cell.minor) for cell in row), fillvalue="")
    ]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in grid]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    head = 1 + max(len(cell.minor) for cell in table.columns)
    return "\n".join([table.title, *lines[:head], rule, *lines[head:], *table.notes]).translate(_ASCII)
