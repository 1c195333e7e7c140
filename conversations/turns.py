"""Turns of a conversation, as found in the wild -> checked lists of {role, content}.

Every function here raises BadRow, with a reason for the person who owns the file.
"""

import re
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

# Names of the roles in OpenAI messages and in ShareGPT.
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

# Where a turn keeps its role and its words: OpenAI, ShareGPT.
_TURN_KEYS = (("role", "content"), ("from", "value"))

# Keys that change what a turn means, and that DeepSeek-V2's template has no place for.
_UNSUPPORTED_KEYS = ("tool_calls", "function_call", "tool_call_id")


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class _Transcript:
    """Conversations written as one string: `start` opens it, `labels` name the speakers."""

    start: str
    labels: dict[str, str]

    def turns(self, text: str) -> list[Message]:
        """The turns, stripped; what one speaker says in two goes is one turn."""
        _, *pieces = re.split(rf"(?:\A|\n\n)({'|'.join(self.labels)}):", text)
        turns: list[Message] = []
        for label, words in zip(pieces[::2], pieces[1::2], strict=True):
            role, content = self.labels[label], words.strip()
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] = "\n\n".join(filter(None, (turns[-1]["content"], content)))
            else:
                turns.append({"role": role, "content": content})
        return turns


_TRANSCRIPTS = (
    _Transcript("\n\nHuman:", {"Human": "user", "Assistant": "assistant"}),  # Anthropic's HH-RLHF
    _Transcript("User:", {"User": "user", "Assistant": "assistant"}),  # DeepSeek-V2's own template, as in ESFT
)


def transcript_turns(text: str) -> list[Message] | None:
    """The turns of a transcript that has both speakers, else None."""
    for transcript in _TRANSCRIPTS:
        if text.startswith(transcript.start) and len(turns := transcript.turns(text)) > 1:
            return turns
    return None


def read_text(value: Any, what: str) -> str:
    """A string that can be written as UTF-8 and holds no NUL."""
    if not isinstance(value, str):
        raise BadRow(f"{what} must be a string, not {_named(value)}")
    if "\0" in value:
        raise BadRow(f"{what} contains a NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow(f"{what} contains half of a surrogate pair") from None
    return value


def read_turn(value: Any, what: str) -> Message:
    """One turn, in OpenAI's or ShareGPT's keys; content in OpenAI's text parts is put together."""
    if not isinstance(value, dict):
        raise BadRow(f"{what} must be an object with role and content, not {_named(value)}")
    for key in _UNSUPPORTED_KEYS:
        if value.get(key):
            raise BadRow(f"{what} has {key}; tool calls are not supported")
    for role_key, content_key in _TURN_KEYS:
        if role_key in value:
            if not (role := _ROLES.get(str(value[role_key]))):
                raise BadRow(f"{what}: unknown role {value[role_key]!r} (known: {', '.join(_ROLES)})")
            return {"role": role, "content": _content(value.get(content_key), f"{what} ({role})")}
    raise BadRow(f"{what} has no role: its keys are {', '.join(map(str, value)) or 'none'}")


def read_turns(value: Any, what: str) -> list[Message]:
    """A list of turns. An empty system message says nothing and is left out."""
    if not isinstance(value, list):
        raise BadRow(f"{what} must be a list of turns, not {_named(value)}")
    turns = [read_turn(turn, f"{what}[{index}]") for index, turn in enumerate(value)]
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        return turns[1:]
    return turns


def check_turns(turns: list[Message], *, empty_last: bool = False) -> None:
    """A system message or none, then user and assistant by turns, the user first; no turn is empty.

    empty_last: the last turn may be empty (an answer in a preference pair: the model said nothing).
    """
    if not turns:
        raise BadRow("the conversation has no turns")
    first = 1 if turns[0]["role"] == "system" else 0
    if len(turns) == first:
        raise BadRow("the conversation has no turn but the system's")
    for number, turn in enumerate(turns[first:]):
        expected = ("user", "assistant")[number % 2]
        place = f"turn {first + number + 1}"
        if turn["role"] != expected:
            raise BadRow(f"{place} is the {turn['role']}'s where the {expected}'s should be")
    for number, turn in enumerate(turns, start=1):
        if not turn["content"].strip() and not (empty_last and number == len(turns)):
            raise BadRow(f"turn {number} ({turn['role']}) is empty")


def _content(value: Any, what: str) -> str:
    if isinstance(value, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise BadRow(f"{what} has parts that are no text")
        value = "".join(read_text(part.get("text"), what) for part in value)
    return read_text(value, f"{what} content")


def _named(value: Any) -> str:
    """A bad value, short enough for a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
