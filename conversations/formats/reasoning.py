"""Reasoning stored beside an answer under various names: refused, dropped, or trained inside tags."""

from collections.abc import Mapping
from typing import Any, Literal

from conversations.formats.bad_row import BadRow, by_spelling, known_name, quoted, read_text

Reasoning = Literal["refuse", "drop", "think_tags"]

KEYS = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "thinking_content", "reasoning_text",
    "reasoning_details", "thinking_blocks", "think", "cot", "chain_of_thought", "reasoning_trace", "thinking_trace",
    "thought_process",
)  # fmt: skip
_KEYS = frozenset(KEYS)
_NAMES = by_spelling(KEYS)
PARTS = ("thinking", "reasoning", "redacted_thinking")  # types of content parts
_TEXT_KEYS = ("text", "thinking", "summary", "content", "reasoning")
# Values that make a row's `reasoning` or `thinking` column a switch, not text.
_SWITCHES = {"on", "off", "yes", "no", "true", "false", "low", "medium", "high", "minimal", "none", "auto"}


def reasoning_of(values: Mapping[str, Any], label: str, mode: Reasoning) -> tuple[str, str] | None:
    """The key that holds reasoning, and its text ("" if it is dropped); None if there is none.

    Raises BadRow for reasoning that is not text, and for several texts that differ, unless reasoning is dropped.
    """
    if not values or _KEYS.isdisjoint(values):
        return None
    if mode == "drop":
        return next(((key, "") for key in KEYS if values.get(key)), None)
    texts = {key: text for key in KEYS if values.get(key) and (text := reasoning_text(values[key], key, label)).strip()}
    if len({text.strip() for text in texts.values()}) > 1:
        raise BadRow(f"{label} has {' and '.join(texts)}, which differ")
    return next(iter(texts.items()), None)


def column_reasoning(columns: Mapping[str, Any], answers: int, mode: Reasoning) -> tuple[str, str] | None:
    """As `reasoning_of`, for the columns that a row's format does not read; a switch such as "on" is not reasoning.

    answers: the row's number of answers. With several, a list of texts is refused: which text belongs to which answer
    is unknown.
    """
    columns = {known_name(key, _NAMES): value for key, value in columns.items()}
    if _KEYS.isdisjoint(columns):
        return None
    texts = {key: columns[key] for key in KEYS if _holds_text(columns.get(key))}
    reasoning = reasoning_of(texts, "the row", mode)
    if reasoning and mode == "think_tags" and answers > 1 and isinstance(texts[reasoning[0]], list):
        raise BadRow(f"the row has {reasoning[0]}, a list beside {answers} answers: move each entry into its turn")
    return reasoning


def is_reasoning(key: Any) -> bool:
    """Whether a row's column is one of KEYS, in any spelling."""
    return known_name(key, _NAMES) in _KEYS


def _holds_text(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() not in _SWITCHES
    return isinstance(value, list) or (isinstance(value, dict) and any(value.get(name) for name in _TEXT_KEYS))


def reasoning_text(value: Any, key: str, label: str) -> str:
    """Reasoning as text, from a string or from blocks as OpenRouter and Anthropic write them."""
    if isinstance(value, list):
        return "\n".join(reasoning_text(part, key, label) for part in value)
    if isinstance(value, dict):
        text = next((value[name] for name in _TEXT_KEYS if value.get(name)), None)
        if text is None or isinstance(text, dict):
            raise BadRow(f"{label} has {key} that is not text: {quoted(value)} (format.reasoning: drop leaves it out)")
        return reasoning_text(text, key, label)
    return read_text(value, f"{label} {key}")


def with_reasoning(content: str, reasoning: tuple[str, str], mode: Reasoning, label: str) -> str:
    """An assistant's text, with or without the reasoning before it."""
    key, text = reasoning
    if mode == "refuse":
        raise BadRow(
            f"{label} has {key}: set format.reasoning to think_tags to train it before the answer, between <think> "
            "and </think>, or to drop to leave it out"
        )
    if mode == "drop":
        return content
    if "<think>" in content:
        raise BadRow(f"{label} has {key}, but its content already contains <think>")
    return f"<think>\n{text.strip()}\n</think>\n\n{content}"
