"""Tools in a conversation, as text.

DeepSeek-V2's released template knows system, user and assistant; tokens for tools belong to later models. So tools
become words of these three roles: definitions end the system message, calls are words of the assistant (trained),
results are a turn of the user (never trained). The form is that of Hermes and Qwen, which servers parse out of plain
text (vLLM's parser "hermes"):

    <tools> one definition a line </tools>
    <tool_call> {"name": ..., "arguments": {...}} </tool_call>
    <tool_response> what the tool said </tool_response>

Every function here raises BadRow, with a reason for the person who owns the file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from conversations.formats.bad_row import BadRow, named
from conversations.formats.training_flags import refuse_flags
from conversations.formats.turns import Turn
from conversations.row import without_nulls
from conversations.tally import Event

# Where a call has its arguments: OpenAI and Hermes, ToolAlpaca, Anthropic.
_ARGUMENTS = ("arguments", "parameters", "input", "args")
# Further keys of a call, which do not bear on what is called.
_CALL_KEYS = {"name", "id", "type", "index", "function"}

# Keywords of JSON Schema whose value may be null.
_MAY_BE_NULL = ("default", "const")

# Where a tool's turn names the call that it answers.
RESULT_IDS = ("tool_call_id", "call_id", "tool_use_id")

_CALL_FORM = '{"name": <name of the tool>, "arguments": <object of its arguments>}'


class Call(NamedTuple):
    """What a result needs to find its call, and the keys of the call that say something and are not used."""

    id: str | None = None
    name: str = ""
    unused: tuple[str, ...] = ()


class ToolUse(NamedTuple):
    """What a turn has to do with tools. is_call: it holds nothing but calls. calls: those it makes. answers: the call
    whose result it is."""

    is_call: bool = False
    calls: tuple[Call, ...] = ()
    answers: Call = Call()


NO_TOOLS = ToolUse()
_NO_RESULT: Event = ("no result", "call")


def tools_text(value: Any) -> str:
    """The end of a system message that offers these tools: a list of definitions, or the same as JSON text.

    A definition is OpenAI's {"type": "function", "function": {"name", ...}} or the inner object alone.
    """
    tools = _parsed(value, "tools")
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not tools:
        raise BadRow(f"tools must be a list of definitions, not {named(value)}")
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


def calls_text(value: Any, what: str) -> tuple[str, list[Call]]:
    """The words of calls, and the calls.

    value: OpenAI's tool_calls (a list), one {"name", "arguments"}, or either of them as JSON text.
    """
    calls = _parsed(value, what)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        raise BadRow(f"{what} must be one call or a list of calls, not {named(value)}")
    read = [_call(call, what) for call in calls]
    return "\n".join(words for words, _ in read), [call for _, call in read]


def result_text(content: str) -> str:
    """The words of a tool's result."""
    return f"<tool_response>\n{content}\n</tool_response>"


def answered_call(values: Mapping[str, Any]) -> Call:
    """The call that a tool's turn answers, by the keys that the turn has beside its content."""
    call_id = next((values[key] for key in RESULT_IDS if values.get(key) not in (None, "")), None)
    return Call(None if call_id is None else str(call_id), str(values.get("name") or ""))


def place_results(read: Sequence[tuple[Turn, ToolUse]], what: str, events: list[Event]) -> list[Turn]:
    """Calls that follow an assistant's turn join it; the results of calls become one turn of the user."""
    turns: list[Turn] = []
    calls: tuple[Call, ...] = ()
    results: dict[int, Turn] = {}
    for index, (turn, use) in enumerate(read):
        if turn.role == "tool":
            results[_place(use.answers, calls, results, f"{what}[{index}]")] = turn
            continue
        turns += _results_turn(results)
        if use.is_call and not results and turns and turns[-1].role == "assistant":
            turns[-1] = _joined(turns[-1], turn, f"{what}[{index}]")
            calls += use.calls
            continue
        events += [_NO_RESULT] * (len(calls) - len(results))
        turns.append(turn)
        calls, results = use.calls, {}
    events += [_NO_RESULT] * (len(calls) - len(results))
    return turns + _results_turn(results)


def _results_turn(results: Mapping[int, Turn]) -> list[Turn]:
    """One turn of the results, by the numbers of their calls; none where there is no result."""
    if not results:
        return []
    words = [results[number].content for number in sorted(results)]
    return [Turn("user", "\n".join(words), where=results[min(results)].where)]


def _joined(turn: Turn, call: Turn, what: str) -> Turn:
    if turn.train != call.train:
        raise BadRow(f"{what} continues the turn before it, but only one of the two is trained")
    return replace(turn, content="\n".join(filter(None, (turn.content.strip(), call.content))))


def _place(answered: Call, calls: tuple[Call, ...], results: Mapping[int, Turn], what: str) -> int:
    """The number of the call that a result answers: by its id where both have one, else by its name, else the next."""
    waiting = [number for number in range(len(calls)) if number not in results]
    for part in ("id", "name"):
        wanted, there = getattr(answered, part), [getattr(call, part) for call in calls]
        if not wanted or not any(there):
            continue
        place = next((number for number in waiting if there[number] == wanted), None)
        if place is None:
            left = ", ".join(repr(there[number]) for number in waiting) or "none"
            raise BadRow(
                f"{what} is a tool result for call {wanted!r}, but no call before it with this {part} awaits a result "
                f"(awaiting: {left})"
            )
        return place
    if not waiting:
        raise BadRow(f"{what} is a tool result, but no call before it awaits one")
    return waiting[0]


def _definition(tool: Any, index: int) -> dict[str, Any]:
    """In OpenAI's form, with what stands beside the function (such as strict)."""
    tool = _parsed(tool, f"tools[{index}]")
    function, beside = _function(tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"tools[{index}] must be a definition with a name, not {named(tool)}")
    function = {key: value for key, value in function.items() if (key, value) != ("type", "function")}
    if schema := function.get("parameters"):
        function["parameters"] = _parsed(schema, f"tools[{index}].parameters")
    # No schema has nulls, except as defaults, but tables that were written as lines do.
    return without_nulls({"type": "function", "function": function, **beside}, keep=_MAY_BE_NULL)


def _function(value: Any) -> tuple[Any, dict[str, Any]]:
    """Of a definition or a call its function, and what stands beside it, but for the type."""
    if not isinstance(value, dict) or "function" not in value:
        return value, {}
    return value["function"], {key: item for key, item in value.items() if key not in ("type", "function")}


def _call(call: Any, what: str) -> tuple[str, Call]:
    call = _parsed(call, what)
    function, beside = _function(call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{what} has a call without a name: {named(call)}")
    name = function["name"]
    refuse_flags({**beside, **function}, f"{what}: the call of {name}")
    arguments = _arguments([*function.items(), *beside.items()], f"{what}: arguments of {name}")
    unused = dict.fromkeys(_unused(function, beside))
    words = f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"
    identity = call.get("id") or function.get("id")
    return words, Call(None if identity is None else str(identity), name, tuple(unused))


def _arguments(items: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    """items: keys and values of a call, of its function and beside it."""
    written = [(key, value) for key, value in items if key in _ARGUMENTS and value not in (None, "")]
    others = [key for key, value in items if key not in (*_ARGUMENTS, *_CALL_KEYS) and value is not None]
    if any(value != written[0][1] for _, value in written) or (others and not written):
        raise BadRow(
            f"{what} must be under the key arguments; the call has {', '.join([key for key, _ in written] or others)}"
        )
    arguments = _parsed(written[0][1], what) if written else {}
    if not isinstance(arguments, dict):
        raise BadRow(f"{what} must be an object, not {named(arguments)}")
    return arguments


def _unused(*parts: dict[str, Any]) -> Iterator[str]:
    for part in parts:
        for key, value in part.items():
            if key not in (*_ARGUMENTS, *_CALL_KEYS) and value not in (None, "", [], {}):
                yield f"tool call's {key}"


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} must be JSON, not {named(value)}") from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
