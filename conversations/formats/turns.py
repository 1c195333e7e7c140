"""A turn of a conversation, its transcripts, and the order that turns must keep.

Every function here raises BadRow, with a reason for the person who owns the file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from conversations.formats.bad_row import BadRow
from conversations.row import Message


@dataclass(frozen=True)
class Turn:
    """A turn as read: role (system, user or assistant) and words.

    train: False where the file says that an assistant's turn is not trained. where: how the file numbers it ("turn 3"),
    or its column. tools: definitions that a system turn brings.
    """

    role: str
    content: str
    train: bool | None = field(default=None, compare=False)
    where: str = field(default="", compare=False)
    tools: Any = field(default=None, compare=False)


def as_messages(turns: Sequence[Turn]) -> list[Message]:
    """The canonical messages. Only one that is not trained says so: `train` is false."""
    return [
        {"role": turn.role, "content": turn.content} | ({"train": False} if turn.train is False else {})
        for turn in turns
    ]


@dataclass(frozen=True)
class _Transcript:
    """Conversations written as one string: `start` opens it, `labels` name the speakers."""

    start: str
    labels: dict[str, str]

    def turns(self, text: str) -> list[Turn]:
        """The turns, stripped; consecutive words of one speaker are one turn."""
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
    """The turns of a transcript that has both speakers, else None."""
    for transcript in _TRANSCRIPTS:
        if text.startswith(transcript.start) and len(turns := transcript.turns(text)) > 1:
            return turns
    return None


def check_turns(turns: Sequence[Turn], *, empty_last: bool = False) -> None:
    """A system message or none, then user and assistant by turns, the user first; no turn is empty.

    empty_last: the last turn may be empty (an answer in a preference pair: the model said nothing).
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
            raise BadRow(f"{where} has role {turn.role} where {expected} is expected")
    for number, turn in enumerate(turns, start=1):
        if not turn.content.strip() and not (empty_last and number == len(turns)):
            is_column = turn.where and not turn.where.startswith("turn")
            where = f"turn {number}" if is_column or not turn.where else turn.where
            raise BadRow(f"{where} ({turn.role}) is empty" + (f": {turn.where}" if is_column else ""))
