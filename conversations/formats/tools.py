"""Tools in a conversation, as text.

DeepSeek-V2's released template has only system, user and assistant roles; tokens for tools came with later models.
Tools are therefore written as text of these roles: definitions end the system message, calls are assistant text
(trained), results are a user turn (never trained). The syntax is that of Hermes and Qwen, which servers parse from
plain text (vLLM's parser "hermes"):

    <tools> one definition per line </tools>
    <tool_call> {"name": ..., "arguments": {...}} </tool_call>
    <tool_response> the tool's result </tool_response>

Every function in this module raises BadRow with a reason for the owner of the file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from conversations.formats.bad_row import BadRow, quoted
from conversations.formats.training_flags import refuse_flags
from conversations.formats.turns import Turn
from conversations.row import without_nulls
from conversations.tally import Event

# Keys of a call's arguments: OpenAI and Hermes, ToolAlpaca, Anthropic.
_ARGUMENTS = ("arguments", "parameters", "input", "args")
# Other keys of a call; they do not affect what is called.
_CALL_KEYS = {"name", "id", "type", "index", "function"}

# Keywords of JSON Schema whose value may be null.
_MAY_BE_NULL = ("default", "const")

# Keys under which a tool turn names the call that it answers.
RESULT_IDS = ("tool_call_id", "call_id", "tool_use_id")

_CALL_FORM = '{"name": <name of the tool>, "arguments": <object of its arguments>}'


class Call(NamedTuple):
    """What a result needs to find its call, and the call's keys that have a value but are not used."""

    id: str | None = None
    name: str = ""
    unused: tuple[str, ...] = ()


class ToolUse(NamedTuple):
    """A turn's use of tools. is_call: it contains nothing but calls. calls: those it makes. answers: the call whose
    result it is."""

    is_call: bool = False
    calls: tuple[Call, ...] = ()
    answers: Call = Call()


NO_TOOLS = ToolUse()
_NO_RESULT: Event = ("no result", "call")


def tools_text(value: Any) -> str:
    """The end of a system message that offers these tools. value: a list of definitions, or its JSON text.

    A definition is OpenAI's {"type": "function", "function": {"name", ...}} or the inner object alone.
    """
    tools = _parsed(value, "tools")
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not tools:
        raise BadRow(f"tools must be a list of definitions, not {quoted(value)}")
    lines = [_json(_definition(tool, index)) for index, tool in enumerate(tools)]
    return "\n".join(
        [
            "You can call these tools:",
            "<tools>",
            *lines,
            "</tools>",
            "For each call write:",
            "<tool_call>",
            _CALL_FORM,
            "</tool_call>",
        ]
    )


def calls_text(value: Any, label: str) -> tuple[str, list[Call]]:
    """The text of calls, and the calls.

    value: OpenAI's tool_calls (a list), one {"name", "arguments"}, or either of them as JSON text.
    """
    calls = _parsed(value, label)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        raise BadRow(f"{label} must be one call or a list of calls, not {quoted(value)}")
    read = [_call(call, label) for call in calls]
    return "\n".join(words for words, _ in read), [call for _, call in read]


def result_text(content: str) -> str:
    """The text of a tool's result."""
    return f"<tool_response>\n{content}\n</tool_response>"


def answered_call(values: Mapping[str, Any]) -> Call:
    """The call that a tool turn answers, from the turn's keys besides its content."""
    call_id = next((values[key] for key in RESULT_IDS if values.get(key) not in (None, "")), None)
    return Call(None if call_id is None else str(call_id), str(values.get("name") or ""))


def place_results(read: Sequence[tuple[Turn, ToolUse]], label: str, events: list[Event]) -> list[Turn]:
    """Merges calls into the assistant turn before them, and the results of a turn's calls into one user turn."""
    turns: list[Turn] = []
    calls: tuple[Call, ...] = ()
    results: dict[int, Turn] = {}
    for index, (turn, use) in enumerate(read):
        if turn.role == "tool":
            results[_place(use.answers, calls, results, f"{label}[{index}]")] = turn
            continue
        turns += _results_turn(results)
        if use.is_call and not results and turns and turns[-1].role == "assistant":
            turns[-1] = _joined(turns[-1], turn, f"{label}[{index}]")
            calls += use.calls
            continue
        events += [_NO_RESULT] * (len(calls) - len(results))
        turns.append(turn)
        calls, results = use.calls, {}
    events += [_NO_RESULT] * (len(calls) - len(results))
    return turns + _results_turn(results)


def _results_turn(results: Mapping[int, Turn]) -> list[Turn]:
    """One user turn with the results, in the order of their calls; no turn if there are none."""
    if not results:
        return []
    words = [results[number].content for number in sorted(results)]
    return [Turn("user", "\n".join(words), where=results[min(results)].where)]


def _joined(turn: Turn, call: Turn, label: str) -> Turn:
    if turn.train != call.train:
        raise BadRow(f"{label} continues the turn before it, but only one of the two is trained")
    return replace(turn, content="\n".join(filter(None, (turn.content.strip(), call.content))))


def _place(target: Call, calls: tuple[Call, ...], results: Mapping[int, Turn], label: str) -> int:
    """Index of the call that a result answers: by id if both have one, otherwise by name, otherwise the next call."""
    waiting = [number for number in range(len(calls)) if number not in results]
    for attribute in ("id", "name"):
        value, values_of_calls = getattr(target, attribute), [getattr(call, attribute) for call in calls]
        if not value or not any(values_of_calls):
            continue
        place = next((number for number in waiting if values_of_calls[number] == value), None)
        if place is None:
            awaiting = ", ".join(repr(values_of_calls[number]) for number in waiting) or "none"
            raise BadRow(
                f"{label} is a tool result for call {value!r}, but no earlier call with this {attribute} awaits a "
                f"result (awaiting: {awaiting})"
            )
        return place
    if not waiting:
        raise BadRow(f"{label} is a tool result, but no earlier call awaits one")
    return waiting[0]


def _definition(tool: Any, index: int) -> dict[str, Any]:
    """A definition in OpenAI's form, with the keys beside the function (such as strict)."""
    tool = _parsed(tool, f"tools[{index}]")
    function, beside = _function(tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"tools[{index}] must be a definition with a name, not {quoted(tool)}")
    function = {key: value for key, value in function.items() if (key, value) != ("type", "function")}
    if schema := function.get("parameters"):
        function["parameters"] = _parsed(schema, f"tools[{index}].parameters")
    # A schema has no nulls except as defaults; tables converted to JSON lines add them.
    return without_nulls({"type": "function", "function": function, **beside}, keep=_MAY_BE_NULL)


def _function(value: Any) -> tuple[Any, dict[str, Any]]:
    """The function of a definition or call, and the keys beside it other than the type."""
    if not isinstance(value, dict) or "function" not in value:
        return value, {}
    return value["function"], {key: item for key, item in value.items() if key not in ("type", "function")}


def _call(call: Any, label: str) -> tuple[str, Call]:
    call = _parsed(call, label)
    function, beside = _function(call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{label} has a call without a name: {quoted(call)}")
    name = function["name"]
    refuse_flags({**beside, **function}, f"{label}: the call of {name}")
    arguments = _arguments([*function.items(), *beside.items()], f"{label}: arguments of {name}")
    unused = dict.fromkeys(_unused(function, beside))
    words = f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"
    identity = call.get("id") or function.get("id")
    return words, Call(None if identity is None else str(identity), name, tuple(unused))


def _arguments(items: list[tuple[str, Any]], label: str) -> dict[str, Any]:
    """The arguments of a call. items: all its keys and values, those of its function included."""
    candidates = [(key, value) for key, value in items if key in _ARGUMENTS and value not in (None, "")]
    other_keys = [key for key, value in items if key not in (*_ARGUMENTS, *_CALL_KEYS) and value is not None]
    if any(value != candidates[0][1] for _, value in candidates) or (other_keys and not candidates):
        keys = ", ".join([key for key, _ in candidates] or other_keys)
        raise BadRow(f"{label} must be under the key arguments; the call has {keys}")
    arguments = _parsed(candidates[0][1], label) if candidates else {}
    if not isinstance(arguments, dict):
        raise BadRow(f"{label} must be an object, not {quoted(arguments)}")
    return arguments


def _unused(*objects: dict[str, Any]) -> Iterator[str]:
    for entries in objects:
        for key, value in entries.items():
            if key not in (*_ARGUMENTS, *_CALL_KEYS) and value not in (None, "", [], {}):
                yield f"tool call's {key}"


def _parsed(value: Any, label: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{label} must be JSON, not {quoted(value)}") from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
