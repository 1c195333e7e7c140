"""The reasoning before an answer, kept beside it under many names: refused, left out, or trained in tags."""

from collections.abc import Mapping
from typing import Any, Literal

from conversations.badrow import BadRow, named, read_text

Reasoning = Literal["refuse", "drop", "think_tags"]

KEYS = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "thinking_content", "reasoning_text",
    "reasoning_details", "thinking_blocks",
)  # fmt: skip
PARTS = ("thinking", "reasoning", "redacted_thinking")  # types of content parts
_TEXT_KEYS = ("text", "thinking", "summary", "content", "reasoning")
# What a column `reasoning` or `thinking` of a whole row may hold instead: a switch.
_SWITCHES = {"on", "off", "yes", "no", "true", "false", "low", "medium", "high", "minimal", "none", "auto"}


def reasoning_of(values: Mapping[str, Any], what: str) -> tuple[str, str] | None:
    """The key that holds reasoning and its text; None where there is none.

    Raises BadRow for reasoning that is no text, and for two that differ.
    """
    found = {key: text for key in KEYS if values.get(key) and (text := reasoning_text(values[key], key, what)).strip()}
    if len({text.strip() for text in found.values()}) > 1:
        raise BadRow(f"{what} has {' and '.join(found)}, which say different things")
    return next(iter(found.items()), None)


def column_reasoning(columns: Mapping[str, Any]) -> tuple[str, str] | None:
    """As reasoning_of, of the columns of a row that its form does not read; a switch such as "on" is none."""
    columns = {key: columns[key] for key in KEYS if isinstance(columns.get(key), (str, list))}
    texts = {key: value for key, value in columns.items() if str(value).strip().lower() not in _SWITCHES}
    return reasoning_of(texts, "the row")


def reasoning_text(value: Any, key: str, what: str) -> str:
    """Text, or blocks of it as OpenRouter and Anthropic write them."""
    if isinstance(value, list):
        return "\n".join(reasoning_text(part, key, what) for part in value)
    if isinstance(value, dict):
        text = next((value[name] for name in _TEXT_KEYS if value.get(name)), None)
        if text is None or isinstance(text, dict):
            raise BadRow(f"{what} has {key} that holds no text: {named(value)}")
        return reasoning_text(text, key, what)
    return read_text(value, f"{what} {key}")


def with_reasoning(content: str, found: tuple[str, str], mode: Reasoning, what: str) -> str:
    """An assistant's words, with the reasoning before them or without it."""
    key, text = found
    if mode == "refuse":
        raise BadRow(
            f"{what} has {key}: format.reasoning: think_tags trains it before the answer, between <think> and "
            "</think>; drop leaves it out"
        )
    if mode == "drop":
        return content
    if "<think>" in content:
        raise BadRow(f"{what} has {key}, and <think> in its words already")
    return f"<think>\n{text.strip()}\n</think>\n\n{content}"
