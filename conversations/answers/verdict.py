"""The verdict of a rule on an answer."""

from dataclasses import dataclass
from typing import NewType

Count = NewType("Count", int)  # a setting that is a whole number from 0


@dataclass(frozen=True)
class Verdict:
    """score: from 0 to 1, or None where the rule does not apply; reason: one sentence, for people."""

    score: float | None
    reason: str


def judged(holds: bool, reason: str) -> Verdict:
    return Verdict(float(holds), reason)


def shown(text: str, length: int = 60) -> str:
    """A text in quotes, short enough for a sentence."""
    text = " ".join(text.split())
    return repr(text if len(text) <= length else f"{text[: length - 3]}...")
