"""Converts lists of turns as found in the wild to lists of Turn. Raises BadRow with a reason for the file's owner."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from conversations.formats.bad_row import BadRow, by_spelling, from_json, known_name, quoted, read_text
from conversations.formats.media import refuse_media
from conversations.formats.reasoning import KEYS as REASONING_KEYS
from conversations.formats.reasoning import PARTS, Reasoning, reasoning_of, reasoning_text, with_reasoning
from conversations.formats.tools import (
    NO_TOOLS,
    RESULT_IDS,
    ToolUse,
    answered_call,
    calls_text,
    place_results,
    result_text,
)
from conversations.formats.training_flags import FLAGS, REVERSED, SPANS, refuse_flags, turn_flag
from conversations.formats.turns import Turn
from conversations.tally import Event

Role = Literal["system", "user", "assistant", "tool"]  # what a source's own role names can be mapped to

# Role names of OpenAI messages, ShareGPT and ms-swift -> ours; "call" becomes assistant and "tool" user.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
# What an unknown role name probably means, for the hint.
_LIKELY = {
    **dict.fromkeys(
        ("bot", "ai", "model", "chatgpt", "chatbot", "agent", "claude", "bing", "bard", "llm"), "assistant"
    ),
    **dict.fromkeys(("prompter", "customer", "client", "person", "q", "question", "instruction"), "user"),
    **dict.fromkeys(("a", "answer", "response", "output", "teacher", "expert", "doctor"), "assistant"),
    **dict.fromkeys(("ipython", "tool_result", "function_response", "tool_output", "environment"), "tool"),
}

ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
TOOLS_KEYS = ("tools", "functions")
CALL_KEYS = ("tool_calls", "function_call")
READ_KEYS = frozenset((*CALL_KEYS, *FLAGS, *REVERSED, SPANS, *REASONING_KEYS))
_SPELLINGS = by_spelling(READ_KEYS)

# Keys of a turn without a role that holds the words of several speakers: {user, assistant}, {input, output}.
_SPEAKERS = {
    **{name: role for name, role in ROLES.items() if role in ("system", "user", "assistant")},
    **dict.fromkeys(("question", "prompt", "query", "input", "instruction"), "user"),
    **dict.fromkeys(("answer", "response", "output", "completion", "bot"), "assistant"),
}
_ORDER = ("system", "user", "assistant")
_TEXT_PARTS = ("text", "input_text", "output_text")
_KEYS_BESIDE = frozenset((*READ_KEYS, *TOOLS_KEYS))


@dataclass(frozen=True)
class Rules:
    """How a source's turns are read. roles: the file's role names -> system, user, assistant or tool."""

    roles: Mapping[str, str] = field(default_factory=dict)
    reasoning: Reasoning = "refuse"


class TurnReader:
    """Reads the turns of one row; adds to `events` what it does not use."""

    def __init__(self, rules: Rules, events: list[Event]):
        self._rules = rules
        self._events = events

    def turns(self, value: Any, label: str, flags: Sequence[tuple[str, bool]] | None = None) -> list[Turn]:
        """The turns of a column that holds a list of turns, or one turn.

        The results of a turn's calls become one user turn, in the order of the calls. An empty system message is left
        out. label: the column, for messages. flags: name and value of each turn's flag in the row's own mask.
        """
        if isinstance(value, dict):
            value = _as_list(value)
        read: list[tuple[Turn, ToolUse]] = []
        for index, raw in enumerate(value):
            if not isinstance(raw, dict):
                raise BadRow(f"{label}[{index}] must be an object with role and content, not {quoted(raw)}")
            where = f"turn {index + 1}" + ("" if label in ("messages", "conversations") else f" of {label}")
            of_entry = self._one_or_more(raw, f"{label}[{index}]")
            for entry in of_entry:
                flag = flags[index] if flags and entry is of_entry[-1] else None
                read.append(self._read(entry, f"{label}[{index}]", where, flag))
        uses_tools = any(use.calls or turn.role == "tool" for turn, use in read)
        turns = place_results(read, label, self._events) if uses_tools else [turn for turn, _ in read]
        return turns[1:] if turns and turns[0] == Turn("system", "") and not turns[0].tools else turns

    def _one_or_more(self, raw: dict[str, Any], label: str) -> list[dict[str, Any]]:
        """The turn itself, or the turns of several speakers that it holds."""
        if first_key(raw, ROLE_KEYS):
            return [raw]
        if spoken := said_by_speakers(raw):
            return spoken
        raise BadRow(f"{label} has no role: its keys are {', '.join(map(str, raw)) or 'none'}")

    def _read(
        self, raw: dict[str, Any], label: str, where: str, row_flag: tuple[str, bool] | None
    ) -> tuple[Turn, ToolUse]:
        role_key = first_key(raw, ROLE_KEYS) or ""
        content_key = first_key(raw, CONTENT_KEYS)
        role = role_of(raw[role_key], self._rules.roles, label)
        rest = self._rest(raw, role, (role_key, content_key), label) if len(raw) > 2 or not content_key else {}
        if content_key is None and _KEYS_BESIDE.isdisjoint(rest):
            raise BadRow(f"{label} ({role}) has no content: its keys are {', '.join(map(str, raw))}")
        words, use = self._words(role, rest, raw.get(content_key or ""), label)
        role = "assistant" if role == "call" else role
        train = self._trained(role, rest, label, row_flag) if rest or row_flag else None
        return Turn(role, words, train, where, self._tools(rest, role, label) if rest else None), use

    def _rest(self, raw: Mapping[str, Any], role: str, read: tuple[str | None, ...], label: str) -> dict[str, Any]:
        """The turn's further known keys, by our names; the others are counted as unused."""
        rest = {known_name(key, _SPELLINGS): value for key, value in raw.items() if key not in read}
        refuse_media(rest, label)
        if rest.get("refusal"):
            raise BadRow(f"{label} has refusal, which is not supported")
        used = {*_KEYS_BESIDE, *(("name", *RESULT_IDS) if role in ("tool", "call") else ())}
        unused = [key for key, value in rest.items() if key not in used and value not in (None, "", [], {})]
        self._unused(unused)
        return rest

    def _unused(self, keys: Iterable[str]) -> None:
        self._events.extend(("turn keys", str(key)) for key in keys)

    def _tools(self, rest: Mapping[str, Any], role: str, label: str) -> Any:
        """The tool definitions of a turn."""
        definitions = {key: rest[key] for key in TOOLS_KEYS if rest.get(key)}
        if definitions and role != "system":
            raise BadRow(
                f"{label} has {next(iter(definitions))}: tool definitions belong to the row or to the system turn"
            )
        return _only(definitions, label)

    def _words(self, role: str, rest: Mapping[str, Any], content: Any, label: str) -> tuple[str, ToolUse]:
        """The text of a turn, and the calls that it makes or answers."""
        if role == "call":
            words, calls = calls_text(content, label)
            self._unused(key for call in calls for key in call.unused)
            return self._reasoned(words, rest, None, label), ToolUse(True, tuple(calls))
        tool_calls = _only({key: rest[key] for key in CALL_KEYS if rest.get(key)}, label) if rest else None
        if tool_calls and role != "assistant":
            raise BadRow(f"{label}: a {role} turn makes tool calls; only assistant turns can")
        if content is None and (tool_calls or rest.get("tools")):
            content = ""
        text, reasoning_part = self._content(content, f"{label} ({role})")
        if not rest and not reasoning_part and role != "tool":
            return text, NO_TOOLS
        if role != "assistant":
            if reasoning := reasoning_part or reasoning_of(rest, label, "refuse"):
                raise BadRow(
                    f"{label} has {reasoning[0]}, but is a {role} turn: only assistant turns can have reasoning"
                )
            return (result_text(text), ToolUse(answers=answered_call(rest))) if role == "tool" else (text, NO_TOOLS)
        words, calls = calls_text(tool_calls, label) if tool_calls else ("", [])
        self._unused(key for call in calls for key in call.unused)
        text = "\n".join(filter(None, (text.strip(), words))) if tool_calls else text
        return self._reasoned(text, rest, reasoning_part, label), ToolUse(calls=tuple(calls))

    def _content(self, value: Any, label: str) -> tuple[str, tuple[str, str] | None]:
        """The text of a turn (OpenAI's text parts joined; a number as text), and the reasoning among its parts."""
        if not isinstance(value, list):
            return read_text(value, f"{label} content"), None
        texts, thoughts = [], []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(part, str) or kind in _TEXT_PARTS:
                texts.append(read_text(part if isinstance(part, str) else part.get("text"), label))
            elif kind in PARTS:
                thoughts.append("" if self._rules.reasoning == "drop" else reasoning_text(part, kind, label))
                continue
            else:
                raise BadRow(f"{label} has a part that is not text: {kind or quoted(part)}")
            beside = (
                {key: item for key, item in part.items() if key not in ("type", "text")}
                if isinstance(part, dict)
                else {}
            )
            refuse_media(beside, label)
            refuse_flags(beside, label)
            self._unused(f"content's {key}" for key, item in beside.items() if item not in (None, "", [], {}))
        return "".join(texts), ("reasoning", "\n".join(thoughts)) if thoughts else None

    def _reasoned(self, words: str, rest: Mapping[str, Any], reasoning_part: tuple[str, str] | None, label: str) -> str:
        """An assistant's text with its reasoning handled as the rules say."""
        reasoning = reasoning_part or reasoning_of(rest, label, self._rules.reasoning)
        if not reasoning:
            return words
        if self._rules.reasoning == "think_tags" and not words.strip():
            raise BadRow(f"{label} has {reasoning[0]} and no answer")
        if self._rules.reasoning == "drop":
            self._events.append(("dropped reasoning", reasoning[0]))
        return with_reasoning(words, reasoning, self._rules.reasoning, label)

    def _trained(
        self, role: str, rest: Mapping[str, Any], label: str, row_flag: tuple[str, bool] | None
    ) -> bool | None:
        own_flag = turn_flag(rest, label)
        if own_flag and row_flag and own_flag[1] != row_flag[1]:
            raise BadRow(f"{label} has {own_flag[0]} {own_flag[1]}, but the row's {row_flag[0]} says {row_flag[1]}")
        name, flag = own_flag or row_flag or ("", None)
        if role != "assistant":
            if flag:
                raise BadRow(f"{label} has {name}, but is a {role} turn: only assistant turns can be trained")
            return None
        if flag is False:
            self._events.append(("untrained", name))
        return flag


def turns_in(value: Any, key: str, always: bool) -> Any:
    """The turns of a column, parsed if they are JSON text (as in a CSV file); None if it does not hold turns.

    always: the column can hold nothing else. Any other list is returned as well, and refused when it is read.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        parsed = from_json(value)
        if always and not isinstance(parsed, list):
            raise BadRow(f"{key} must be a list of turns, or one as JSON, not {quoted(value)}")
        value = parsed if always or _have_roles(parsed) else value
    is_list = isinstance(value, list) and key != "history"  # which may hold pairs of texts
    return value if is_list or _are_turns(value) else None


def _as_list(value: dict[str, Any]) -> list[dict[str, Any]]:
    """One turn, or several stored as an object of lists, as older versions of the datasets library did."""
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) < len(value) or len({len(item) for item in lists}) != 1:
        return [value]
    return [dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True)]


def _are_turns(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(turn, dict) for turn in value)
    return isinstance(value, dict) and bool(first_key(value, ROLE_KEYS) or said_by_speakers(value))


def _have_roles(value: Any) -> bool:
    """Whether the parsed JSON of a text column is a list of turns rather than ordinary text."""
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(
        isinstance(turn, dict) and first_key(turn, ROLE_KEYS) and first_key(turn, CONTENT_KEYS) for turn in turns
    )


def _only(values: Mapping[str, Any], label: str) -> Any:
    """The value that several keys for the same thing agree on; None if there is none."""
    first = next(iter(values.values()), None)
    if any(value != first for value in values.values()):
        raise BadRow(f"{label} has {' and '.join(values)}, which differ; keep one of them")
    return first


def role_of(value: Any, roles: Mapping[str, str], label: str) -> str:
    """Our name for a role: system, user, assistant, tool, or call (an assistant turn with nothing but a call)."""
    if not isinstance(value, str):
        raise BadRow(f"{label}: the role must be a string, not {quoted(value)}")
    role = roles.get(value) or ROLES.get(value.lower())
    if role is None:
        likely = _LIKELY.get(value.lower(), "assistant")
        raise BadRow(
            f"{label}: unknown role {value!r} (known: {', '.join(ROLES)}); map it in the data entry, for example "
            f"roles: {{{value}: {likely}}}"
        )
    return role


def first_key(value: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of these keys that is not null; otherwise the first that is present."""
    present = [key for key in keys if key in value]
    return next((key for key in present if value[key] is not None), present[0] if present else None)


def said_by_speakers(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of {user: ..., assistant: ...}: one per speaker among the keys; empty if there is none.

    All other keys (flags, reasoning) go to the assistant's turn.
    """
    spoken = {key: _SPEAKERS[key] for key in value if key in _SPEAKERS and value[key] not in (None, "")}
    if len(set(spoken.values())) != len(spoken):
        return []
    rest = {key: words for key, words in value.items() if key not in _SPEAKERS}
    keys = sorted(spoken, key=lambda key: _ORDER.index(spoken[key]))
    turns = [{"role": spoken[key], "content": value[key]} for key in keys]
    if turns:
        turns[-1] |= rest
    return turns
