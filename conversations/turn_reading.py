"""Lists of turns, as found in the wild -> lists of Turn. Raises BadRow, with a reason for who owns the file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conversations.badrow import BadRow, named, read_text
from conversations.media import refuse_media
from conversations.reasoning import PARTS, Reasoning, reasoning_of, reasoning_text, with_reasoning
from conversations.tally import Event
from conversations.tools import calls_text, result_text, tools_text
from conversations.training_flags import turn_flag
from conversations.turn_keys import (
    CALL_KEYS,
    CONTENT_KEYS,
    READ_KEYS,
    ROLE_KEYS,
    TOOLS_KEYS,
    first_key,
    role_of,
    said_by_speakers,
)
from conversations.turns import Turn

_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Rules:
    """How a source's turns are read. roles: the file's name for a role -> system, user, assistant or tool."""

    roles: Mapping[str, str] = field(default_factory=dict)
    reasoning: Reasoning = "refuse"


@dataclass(frozen=True)
class _Said:
    """A turn before tools are put in their places. calls: of each call it makes, its id. answers: the id of the call
    that a tool answers."""

    turn: Turn
    is_call: bool = False
    calls: tuple[str | None, ...] = ()
    answers: str | None = None


class TurnReader:
    """Reads the turns of one row; what it does not use goes to `events`."""

    def __init__(self, rules: Rules, events: list[Event]):
        self._rules = rules
        self._events = events

    def turns(self, value: Any, what: str, flags: Sequence[tuple[str, bool]] | None = None) -> list[Turn]:
        """A list of turns, or one turn, of a column.

        flags: for each turn the name and value of its flag in the row's own mask. The results of a turn's calls become
        one turn of the user, in the order of the calls. An empty system message says nothing and is left out.
        """
        if isinstance(value, dict):
            value = _as_list(value)
        said = []
        for index, raw in enumerate(value):
            if not isinstance(raw, dict):
                raise BadRow(f"{what}[{index}] must be an object with role and content, not {named(raw)}")
            where = f"turn {index + 1}" + ("" if what in ("messages", "conversations") else f" of {what}")
            of_entry = self._one_or_more(raw, f"{what}[{index}]")
            for one in of_entry:
                flag = flags[index] if flags and one is of_entry[-1] else None
                said.append(self._read(one, f"{what}[{index}]", where, flag))
        turns = self._placed(said, what)
        return turns[1:] if turns and turns[0] == Turn("system", "") and not turns[0].tools else turns

    def _one_or_more(self, raw: dict[str, Any], what: str) -> list[dict[str, Any]]:
        """The turn itself, or those of several speakers that it holds."""
        if first_key(raw, ROLE_KEYS):
            return [raw]
        if found := said_by_speakers(raw):
            return found
        raise BadRow(f"{what} has no role: its keys are {', '.join(map(str, raw)) or 'none'}")

    def _read(self, raw: dict[str, Any], what: str, where: str, row_flag: tuple[str, bool] | None) -> _Said:
        role_key = first_key(raw, ROLE_KEYS) or ""
        content_key = first_key(raw, CONTENT_KEYS) or ""
        role = role_of(raw[role_key], self._rules.roles, what)
        rest = {key: value for key, value in raw.items() if key not in (role_key, content_key)}
        refuse_media(rest, what)
        if rest.get("refusal"):
            raise BadRow(f"{what} has refusal, which is not supported")
        tools = self._tools(rest, role, what)
        known = {*READ_KEYS, *TOOLS_KEYS, *({"name"} if role in ("tool", "call") else ())}
        unused = (key for key, value in rest.items() if key not in known and value not in (None, "", [], {}))
        self._events += [("turn keys", str(key)) for key in unused]
        said = self._words(role, rest, raw.get(content_key), what)
        train = self._trained(said.turn.role, rest, what, row_flag)
        return replace(said, turn=replace(said.turn, train=train, where=where, tools=tools))

    def _tools(self, rest: Mapping[str, Any], role: str, what: str) -> Any:
        """Definitions of tools that stand in a turn."""
        key = next((key for key in TOOLS_KEYS if rest.get(key)), None)
        if key and role != "system":
            raise BadRow(f"{what} has {key}: definitions belong to the row or to the system's turn")
        return rest[key] if key else None

    def _words(self, role: str, rest: Mapping[str, Any], content: Any, what: str) -> _Said:
        if role == "call":
            words, ids = calls_text(content, what)
            return _Said(Turn("assistant", self._reasoned(words, rest, None, what)), True, tuple(ids))
        if role == "tool":
            words = read_content(content, f"{what} (tool)")[0]
            return _Said(Turn("tool", result_text(words)), answers=rest.get("tool_call_id") or None)
        calls = next((rest[key] for key in CALL_KEYS if rest.get(key)), None)
        if calls and role != "assistant":
            raise BadRow(f"{what}: the {role} makes tool calls; only an assistant can")
        if content is None and (calls or rest.get("tools")):
            content = ""
        said, thought = read_content(content, f"{what} ({role})")
        if role != "assistant":
            if found := thought or reasoning_of(rest, what):
                raise BadRow(f"{what} has {found[0]}, but is the {role}'s: only an assistant reasons")
            return _Said(Turn(role, said))
        words, ids = calls_text(calls, what) if calls else ("", [])
        said = "\n".join(filter(None, (said.strip(), words))) if calls else said
        return _Said(Turn(role, self._reasoned(said, rest, thought, what)), calls=tuple(ids))

    def _reasoned(self, words: str, rest: Mapping[str, Any], thought: tuple[str, str] | None, what: str) -> str:
        """An assistant's words with its reasoning as the rules want it."""
        found = thought or reasoning_of(rest, what)
        if not found:
            return words
        if self._rules.reasoning == "think_tags" and not words.strip():
            raise BadRow(f"{what} has {found[0]} and no answer")
        if self._rules.reasoning == "drop":
            self._events.append(("dropped reasoning", found[0]))
        return with_reasoning(words, found, self._rules.reasoning, what)

    def _trained(self, role: str, rest: Mapping[str, Any], what: str, row_flag: tuple[str, bool] | None) -> bool | None:
        own = turn_flag(rest, what)
        if own and row_flag and own[1] != row_flag[1]:
            raise BadRow(f"{what} has {own[0]} {own[1]}, but the row's {row_flag[0]} says {row_flag[1]}")
        name, flag = own or row_flag or ("", None)
        if role != "assistant":
            if flag:
                raise BadRow(f"{what} has {name}, but is the {role}'s: only the assistant's turns can be trained")
            return None
        if flag is False:
            self._events.append(("untrained", name))
        return flag

    def _placed(self, said: Sequence[_Said], what: str) -> list[Turn]:
        """Calls that follow an assistant's turn join it; the results of calls become one turn of the user."""
        turns: list[Turn] = []
        calls: tuple[str | None, ...] = ()
        results: dict[int, Turn] = {}
        for index, one in enumerate(said):
            if one.turn.role == "tool":
                results[_place(one, calls, results, f"{what}[{index}]")] = one.turn
                continue
            turns += self._told(calls, results)
            if one.is_call and not results and turns and turns[-1].role == "assistant":
                turns[-1] = _joined(turns[-1], one.turn, f"{what}[{index}]")
                calls += one.calls
                continue
            if not results:
                self._events += [("no result", "call")] * len(calls)
            turns.append(one.turn)
            calls, results = one.calls, {}
        if not results:
            self._events += [("no result", "call")] * len(calls)
        return turns + self._told(calls, results)

    def _told(self, calls: tuple[str | None, ...], results: dict[int, Turn]) -> list[Turn]:
        """The tools' results as a turn, in the order of the calls."""
        if not results:
            return []
        self._events += [("no result", "call")] * (len(calls) - len(results))
        first, words = results[min(results)], [results[number].content for number in sorted(results)]
        return [Turn("user", "\n".join(words), where=first.where)]


def read_content(value: Any, what: str) -> tuple[str, tuple[str, str] | None]:
    """The words of a turn (OpenAI's text parts put together; a number as text), and the reasoning among its parts."""
    if not isinstance(value, list):
        return read_text(value, f"{what} content"), None
    texts, thoughts = [], []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or kind in _TEXT_PARTS:
            texts.append(read_text(part if isinstance(part, str) else part.get("text"), what))
        elif kind in PARTS:
            thoughts.append(reasoning_text(part, kind, what))
        else:
            raise BadRow(f"{what} has parts that are no text: {kind or named(part)}")
    return "".join(texts), ("reasoning", "\n".join(thoughts)) if any(thoughts) else None


def turns_in(value: Any, key: str, always: bool) -> Any:
    """The value with the turns that it writes as JSON text (as in a CSV file) parsed; None where it holds no turns.

    always: the column can hold nothing else. Any other list is taken for turns, and refused when it is read.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        parsed = _from_json(value)
        if always and not isinstance(parsed, list):
            raise BadRow(f"{key} must be a list of turns, or one as JSON, not {named(value)}")
        value = parsed if always or _have_roles(parsed) else value
    is_list = isinstance(value, list) and key != "history"  # which may hold pairs of texts
    return value if is_list or _are_turns(value) else None


def _as_list(value: dict[str, Any]) -> list[dict[str, Any]]:
    """One turn; or turns whose columns are lists, as the library datasets once stored them."""
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) < len(value) or len({len(item) for item in lists}) != 1:
        return [value]
    return [dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True)]


def has_tools(turns: Sequence[Turn]) -> str:
    """The text of the definitions that the first turn brings, if it is the system's."""
    return tools_text(turns[0].tools) if turns and turns[0].tools else ""


def _are_turns(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, dict) for one in value)
    return isinstance(value, dict) and bool(first_key(value, ROLE_KEYS) or said_by_speakers(value))


def _have_roles(value: Any) -> bool:
    """Whether JSON text in a column of words is a list of turns, and no words of its own."""
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(
        isinstance(one, dict) and first_key(one, ROLE_KEYS) and first_key(one, CONTENT_KEYS) for one in turns
    )


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _joined(turn: Turn, call: Turn, what: str) -> Turn:
    if turn.train != call.train:
        raise BadRow(f"{what} goes on with the turn before it, but only one of them is trained")
    return replace(turn, content="\n".join(filter(None, (turn.content.strip(), call.content))))


def _place(said: _Said, calls: tuple[str | None, ...], results: Mapping[int, Turn], what: str) -> int:
    """The number of the call that a result answers: by its id where both have one, else the next one."""
    waiting = [number for number in range(len(calls)) if number not in results]
    if said.answers is not None and any(calls):
        place = next((number for number in waiting if calls[number] == said.answers), None)
        if place is None:
            ids = ", ".join(repr(calls[number]) for number in waiting) or "none"
            raise BadRow(
                f"{what} is a tool's result for call {said.answers!r}, but no call before it waits for one of this id "
                f"(waiting: {ids})"
            )
        return place
    if not waiting:
        raise BadRow(f"{what} is a tool's result, but no call before it waits for one")
    return waiting[0]
