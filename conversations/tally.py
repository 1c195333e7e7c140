"""Counts what a reader did not use, or changed in a row, to be reported once."""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

Kind = Literal["columns", "beside", "turn keys", "untrained", "dropped reasoning", "no result"]
Event = tuple[Kind, str]  # what happened, and the key concerned

_WORDS: dict[Kind, tuple[str, str]] = {
    "columns": ("columns not used", "row"),
    "beside": ("keys beside the rows, not read", "file"),
    "turn keys": ("keys of turns not used", "turn"),
    "untrained": ("turns left untrained by their own flags", "turn"),
    "dropped reasoning": ("reasoning left out", "turn"),
    "no result": ("tool calls without a result", "call"),
}
_SHOWN = 30


def counted(number: int, unit: str = "row") -> str:
    """ "1 row", "1,200 rows"."""
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"


def event_lines(events: Mapping[Event, int]) -> list[str]:
    """One line per kind of event: "columns not used: context (12,000 rows), id (12,000 rows)"."""
    lines = []
    for kind, (words, unit) in _WORDS.items():
        counts = Counter({name: number for (of, name), number in events.items() if of == kind}).most_common()
        names = [f"{name} ({counted(number, unit)})" for name, number in counts[:_SHOWN]]
        if len(counts) > _SHOWN:
            names.append(f"and {len(counts) - _SHOWN:,} more")
        lines += [f"{words}: {', '.join(names)}"] if names else []
    return lines
