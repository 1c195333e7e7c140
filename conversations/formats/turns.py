"""A turn of a conversation, transcripts of turns, and the order that turns must follow.

Functions in this module raise BadRow with a reason for the owner of the file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from conversations.formats.bad_row import BadRow
from conversations.row import Message


@dataclass(frozen=True)
class Turn:
    """A turn as read: role (system, user or assistant) and text.

    train: False if the file excludes an assistant turn from training. where: the turn's number in the file ("turn 3"),
    or its column. tools: tool definitions of a system turn.
    """

    role: str
    content: str
    train: bool | None = field(default=None, compare=False)
    where: str = field(default="", compare=False)
    tools: Any = field(default=None, compare=False)


def as_messages(turns: Sequence[Turn]) -> list[Message]:
    """The canonical messages; `train` is present (and false) only for turns excluded from training."""
    return [
        {"role": turn.role, "content": turn.content} | ({"train": False} if turn.train is False else {})
        for turn in turns
    ]


@dataclass(frozen=True)
class _Transcript:
    """A format of conversations in one string: it begins with `start`; `labels` name the speakers."""

    start: str
    labels: dict[str, str]

    def turns(self, text: str) -> list[Turn]:
        """The turns, stripped; consecutive text of one speaker is one turn."""
        _, *pieces = re.split(rf"(?:\A|\n\n)({'|'.join(self.labels)}):", text)
        turns: list[Turn] = []
        for label, words in zip(pieces[::2], pieces[1::2], strict=True):
            role, content = self.labels[label], words.strip()
            if turns and turns[-1].role == role:
                content = "\n\n".join(filter(None, (turns.pop().content, content)))
            turns.append(Turn(role, content))
        return turns


_TRANSCRIPTS = (
    _Transcript("\n\nHuman:", {"Human": "user", "Assistant": "assistant"}),  # Anthropic's HH-RLHF
    _Transcript("User:", {"User": "user", "Assistant": "assistant"}),  # DeepSeek-V2's own template, as in ESFT
)


def transcript_turns(text: str) -> list[Turn] | None:
    """The turns of a transcript with both speakers; otherwise None."""
    for transcript in _TRANSCRIPTS:
        if text.startswith(transcript.start) and len(turns := transcript.turns(text)) > 1:
            return turns
    return None


def check_turns(turns: Sequence[Turn], *, empty_last: bool = False) -> None:
    """Check the order: an optional system message, then user and assistant alternating, user first; no turn is empty.

    empty_last: the last turn may be empty (in a preference pair the model may have answered nothing).
    """
    if not turns:
        raise BadRow("the conversation has no turns")
    first = 1 if turns[0].role == "system" else 0
    if len(turns) == first:
        raise BadRow("the conversation has only a system turn")
    for number, turn in enumerate(turns[first:]):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            where = turn.where if turn.where.startswith("turn") else f"turn {first + number + 1}"
            raise BadRow(f"{where} has role {turn.role}, but {expected} is expected")
    for number, turn in enumerate(turns, start=1):
        if not turn.content.strip() and not (empty_last and number == len(turns)):
            is_column = turn.where and not turn.where.startswith("turn")
            where = f"turn {number}" if is_column or not turn.where else turn.where
            raise BadRow(f"{where} ({turn.role}) is empty" + (f": {turn.where}" if is_column else ""))
