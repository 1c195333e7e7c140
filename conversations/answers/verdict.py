"""The verdict of a rule on an answer."""

from dataclasses import dataclass
from typing import NewType

Count = NewType("Count", int)  # a setting that is a non-negative whole number


@dataclass(frozen=True)
class Verdict:
    """score: from 0 to 1, or None if the rule does not apply; reason: one sentence for display."""

    score: float | None
    reason: str


def judged(holds: bool, reason: str) -> Verdict:
    return Verdict(float(holds), reason)


def shown(text: str, length: int = 60) -> str:
    """A text in quotes, short enough for a sentence."""
    text = " ".join(text.split())
    return repr(text if len(text) <= length else f"{text[: length - 3]}...")
