"""The names that turns have in the wild: of roles, of keys that hold role and words, and of all that is read."""

from collections.abc import Mapping
from typing import Any

from conversations.formats.bad_row import BadRow, named
from conversations.formats.reasoning import KEYS as REASONING_KEYS
from conversations.formats.training_flags import FLAGS, REVERSED, SPANS

# Names of the roles in OpenAI messages, ShareGPT and ms-swift -> ours; "call" and "tool" end as assistant and user.
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
# What a role of another name probably is, for the hint.
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

# A turn without a role that holds what several speakers said: {user, assistant}, {input, output}.
_SPEAKERS = {
    **{name: role for name, role in ROLES.items() if role in ("system", "user", "assistant")},
    **dict.fromkeys(("question", "prompt", "query", "input", "instruction"), "user"),
    **dict.fromkeys(("answer", "response", "output", "completion", "bot"), "assistant"),
}
_ORDER = ("system", "user", "assistant")


def role_of(value: Any, roles: Mapping[str, str], what: str) -> str:
    """Our name of a role: system, user, assistant, tool, or call (an assistant's that holds nothing but a call)."""
    if not isinstance(value, str):
        raise BadRow(f"{what}: the role must be a string, not {named(value)}")
    role = roles.get(value) or ROLES.get(value.lower())
    if role is None:
        likely = _LIKELY.get(value.lower(), "assistant")
        raise BadRow(
            f"{what}: unknown role {value!r} (known: {', '.join(ROLES)}); say in the data entry what it is, such as "
            f"roles: {{{value}: {likely}}}"
        )
    return role


def first_key(value: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of these keys that holds something; else the first that is there."""
    there = [key for key in keys if key in value]
    return next((key for key in there if value[key] is not None), there[0] if there else None)


def said_by_speakers(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turns of {user: ..., assistant: ...}: one for each speaker in the turn's keys, none where it has no such key.

    What else it says (flags, reasoning) belongs to the assistant's turn.
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
