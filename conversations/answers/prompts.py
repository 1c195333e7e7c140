"""The prompt of a row, for stages in which a model answers."""

from collections.abc import Sequence

from conversations.errors import ToolkitError
from conversations.row import Message, Row


def split_prompt(messages: Sequence[Message]) -> tuple[list[Message], str | None]:
    """A conversation without its last answer, and that answer (None if the last turn is the user's)."""
    if messages and messages[-1]["role"] == "assistant":
        return list(messages[:-1]), messages[-1]["content"]
    return list(messages), None


def prompt_of(row: Row, number: int) -> list[Message]:
    """The messages of a row that come before its last answer.

    Raises:
        ToolkitError: the row holds neither messages nor a prompt, or nothing comes before the answer.
    """
    messages = row["prompt"] if "prompt" in row else row.get("messages")
    if messages is None:
        raise ToolkitError(f"row {number} has no messages and no prompt (it has {', '.join(sorted(row))})")
    prompt, _ = split_prompt(messages)
    if not prompt:
        raise ToolkitError(f"row {number} has no question: nothing comes before its answer")
    return prompt


def prompt_row(row: Row, number: int) -> Row:
    """What is known of a row where a model answers: its prompt, and its reference or None. Raises as `prompt_of`."""
    prompt = [{"role": m["role"], "content": m["content"]} for m in prompt_of(row, number)]
    return {"prompt": prompt, "reference": row.get("reference")}


def prompt_text(messages: Sequence[Message]) -> str:
    """A prompt for display: the user's words alone, or each turn with its role if there are several."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def answer_text(content: str) -> str:
    """An answer as decoded, without the space that the template puts before it."""
    return content.strip()
