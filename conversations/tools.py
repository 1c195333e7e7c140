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
from typing import Any

from conversations.badrow import BadRow, named

_CALL_FORM = '{"name": <name of the tool>, "arguments": <object of its arguments>}'


def tools_text(value: Any) -> str:
    """The end of a system message that offers these tools: a list of definitions, or the same as JSON text.

    A definition is OpenAI's {"type": "function", "function": {"name", ...}} or the inner object alone.
    """
    tools = _parsed(value, "tools")
    if not isinstance(tools, list) or not tools:
        raise BadRow(f"tools must be a list of definitions, not {named(value)}")
    lines = [_json({"type": "function", "function": _definition(tool, i)}) for i, tool in enumerate(tools)]
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


def calls_text(value: Any, what: str) -> tuple[str, list[str | None]]:
    """The words of calls, and their ids (None where there is none).

    value: OpenAI's tool_calls (a list), one {"name", "arguments"}, or either of them as JSON text.
    """
    calls = _parsed(value, what)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        raise BadRow(f"{what} must be one call or a list of calls, not {named(value)}")
    return "\n".join(_call(call, what) for call in calls), [call.get("id") for call in calls]


def result_text(content: str) -> str:
    """The words of a tool's result."""
    return f"<tool_response>\n{content}\n</tool_response>"


def _definition(tool: Any, index: int) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"tools[{index}] must be a definition with a name, not {named(tool)}")
    return function


def _call(call: Any, what: str) -> str:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{what} has a call without a name: {named(call)}")
    arguments = _parsed(function.get("arguments") or {}, f"{what}: arguments of {function['name']}")
    if not isinstance(arguments, dict):
        raise BadRow(f"{what}: arguments of {function['name']} must be an object, not {named(arguments)}")
    return f"<tool_call>\n{_json({'name': function['name'], 'arguments': arguments})}\n</tool_call>"


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} must be JSON, not {named(value)}") from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
