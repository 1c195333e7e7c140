"""Turns of a conversation, as found in the wild -> checked lists of {role, content}.

Every function here raises BadRow, with a reason for the person who owns the file.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from conversations.badrow import BadRow, named, read_text
from conversations.tools import calls_text, result_text

Message = dict[str, str]

# Names of the roles in OpenAI messages and in ShareGPT -> ours; "call" and "tool" end as assistant and user.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# Where a turn keeps its role and its words: OpenAI, ShareGPT.
_TURN_KEYS = (("role", "content"), ("from", "value"))

# Keys that change what a turn says, or whether it is trained, and that nothing here has a place for.
_UNSUPPORTED_KEYS = ("reasoning_content", "refusal", "audio", "images")


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


class _Turn(NamedTuple):
    """A turn as read. calls: the ids of the calls it makes. answers: the id of the call that a tool answers."""

    role: str
    content: str
    calls: tuple[str | None, ...] = ()
    answers: str | None = None

    def as_message(self) -> Message:
        return {"role": self.role, "content": self.content}


def transcript_turns(text: str) -> list[Message] | None:
    """The turns of a transcript that has both speakers, else None."""
    for transcript in _TRANSCRIPTS:
        if text.startswith(transcript.start) and len(turns := transcript.turns(text)) > 1:
            return turns
    return None


def read_turn(value: Any, what: str) -> Message:
    """One turn, in OpenAI's or ShareGPT's keys; content in OpenAI's text parts is put together."""
    return _read(value, what).as_message()


def read_turns(value: Any, what: str) -> list[Message]:
    """A list of turns (or its JSON text, as in a CSV file). An empty system message says nothing and is left out.

    The results of a turn's calls become one turn of the user, in the order of the calls.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, what)
    if not isinstance(value, list):
        raise BadRow(f"{what} must be a list of turns, not {named(value)}")
    turns: list[Message] = []
    calls: tuple[str | None, ...] = ()
    results: dict[int, str] = {}
    for index, raw in enumerate(value):
        turn = _read(raw, f"{what}[{index}]")
        if turn.role == "tool":
            results[_place(turn, calls, results, f"{what}[{index}]")] = turn.content
            continue
        turns += _told(results)
        turns.append(turn.as_message())
        calls, results = turn.calls, {}
    turns += _told(results)
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
        if turn["role"] != expected:
            raise BadRow(f"turn {first + number + 1} is the {turn['role']}'s where the {expected}'s should be")
    for number, turn in enumerate(turns, start=1):
        if not turn["content"].strip() and not (empty_last and number == len(turns)):
            raise BadRow(f"turn {number} ({turn['role']}) is empty")


def _read(value: Any, what: str) -> _Turn:
    if not isinstance(value, dict):
        raise BadRow(f"{what} must be an object with role and content, not {named(value)}")
    for key in _UNSUPPORTED_KEYS:
        if value.get(key):
            raise BadRow(f"{what} has {key}, which is not supported")
    if value.get("weight") not in (None, 1):
        raise BadRow(f"{what} has weight {value['weight']!r}: turns are trained as format.train_on says")
    for role_key, content_key in _TURN_KEYS:
        if role_key in value:
            if not (role := _ROLES.get(str(value[role_key]))):
                raise BadRow(f"{what}: unknown role {value[role_key]!r} (known: {', '.join(_ROLES)})")
            return _by_role(role, value, value.get(content_key), what)
    raise BadRow(f"{what} has no role: its keys are {', '.join(map(str, value)) or 'none'}")


def _by_role(role: str, value: dict[str, Any], content: Any, what: str) -> _Turn:
    if role == "call":
        words, ids = calls_text(content, what)
        return _Turn("assistant", read_text(words, what), tuple(ids))
    if role == "tool":
        return _Turn("tool", result_text(_content(content, f"{what} (tool)")), answers=value.get("tool_call_id"))
    calls = value.get("tool_calls") or value.get("function_call")
    if not calls:
        return _Turn(role, _content(content, f"{what} ({role})"))
    if role != "assistant":
        raise BadRow(f"{what}: the {role} makes tool calls; only an assistant can")
    said = _content(content, f"{what} ({role})").strip() if content else ""
    words, ids = calls_text(calls, what)
    return _Turn(role, read_text("\n".join(filter(None, (said, words))), what), tuple(ids))


def _place(turn: _Turn, calls: tuple[str | None, ...], results: dict[int, str], what: str) -> int:
    """The number of the call that a result answers: by its id where both have one, else the next one."""
    if turn.answers is not None and any(calls):
        place = calls.index(turn.answers) if turn.answers in calls else None
    else:
        place = next((number for number in range(len(calls)) if number not in results), None)
    if place is None or place in results:
        raise BadRow(f"{what} is a tool's result, but no call before it waits for one")
    return place


def _told(results: dict[int, str]) -> list[Message]:
    """The tools' results as a turn, in the order of the calls."""
    if not results:
        return []
    return [{"role": "user", "content": "\n".join(results[number] for number in sorted(results))}]


def _content(value: Any, what: str) -> str:
    if isinstance(value, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise BadRow(f"{what} has parts that are no text")
        value = "".join(read_text(part.get("text"), what) for part in value)
    return read_text(value, f"{what} content")


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} must be a list of turns, or one as JSON, not {named(text)}") from None
