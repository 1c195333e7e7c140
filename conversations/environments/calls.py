"""The calls of tools in a model's text, as conversations/formats/tools.py writes them, and their results as text."""

import json
import re
from typing import Any, NamedTuple

# As vLLM's parser "hermes": the last call may lack its end.
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)


class ToolCall(NamedTuple):
    """A call. fault: why it cannot be made, for the model to read; None if it is well-formed."""

    name: str = ""
    arguments: dict[str, Any] = {}  # noqa: RUF012 - never changed
    fault: str | None = None


def calls_in(text: str) -> list[ToolCall]:
    """The calls in a turn, in order; malformed ones too."""
    return [_call(closed or last) for closed, last in _CALL.findall(text)]


def _call(written: str) -> ToolCall:
    try:
        value = json.loads(written)
    except (ValueError, RecursionError) as error:
        return ToolCall(fault=f"the call is not JSON: {error}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return ToolCall(fault='a call must be {"name": <name of the tool>, "arguments": <object of its arguments>}')
    arguments = value.get("arguments")
    if not isinstance(arguments, dict):
        return ToolCall(value["name"], fault="arguments must be an object")
    return ToolCall(value["name"], arguments)


def text_of(result: Any) -> str:
    """A tool's result as text: strings as they are, everything else as JSON."""
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def error_text(error: object) -> str:
    """A failed call's result."""
    return text_of({"error": str(error)})
