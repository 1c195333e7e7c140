"""Messages -> token ids and loss mask: the one place that decides what is trained.

In each assistant turn, exactly the content (in DeepSeek-V2's template with the space before it) and the end token are
trained; everything else is context. A turn is trained if
`train_on` selects it and its own `train` is not false.

A conversation is encoded in pieces, split where training starts and stops and at special tokens. For every tokenizer,
this guarantees that no token straddles the edge of the mask, and that a prompt rendered with `add_generation_prompt`
is, id by id, a prefix of the same conversation rendered with its answer. For the released tokenizer the ids are those
of `apply_chat_template`: it never merges across these boundaries.

Text cannot forge control tokens (conversations/rendering/encoding.py): only the template writes begin and end tokens.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from conversations.errors import ToolkitError
from conversations.rendering.encoding import Run, control_pattern, encode_runs, special_ids_of
from conversations.rendering.template import has_other_template, layout, own_prompt, template_of
from conversations.rendering.template_parts import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["all_assistant", "last_assistant"]


def render_conversation(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    train_on: TrainOn = "all_assistant",
    add_generation_prompt: bool = False,
) -> dict[str, list[int]]:
    """Render messages with the tokenizer's own template, or that of the model's family, and its begin and end tokens.

    Args:
        messages: each `{"role", "content"}`; roles are system, user and assistant. A prompt is a list that
            ends with a user turn. `train: False` excludes an assistant turn from the mask; true or null changes
            nothing.
        tokenizer: any fast tokenizer of transformers with an end token. Its chat template is used if it is one that we
            know or can be trained with (template.py); otherwise, and without one, it is DeepSeek-V2's.
        train_on: all assistant turns, or only the last one.
        add_generation_prompt: end as the assistant's turn begins ("Assistant:"), for a model to continue.

    Returns:
        `input_ids` and `assistant_mask`, two lists of equal length; the mask is 1 on trained tokens.

    Raises:
        ToolkitError: an unknown role, content that is not a string, a `train` that is not a boolean or is true for
            a turn that is not the assistant's, an unknown `train_on`, a tokenizer without an end token, or one
            that encodes plain text as its begin or end token.
    """
    return encode_runs(conversation_runs(messages, tokenizer, train_on, add_generation_prompt), tokenizer)


def conversation_runs(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    train_on: TrainOn = "all_assistant",
    add_generation_prompt: bool = False,
) -> list[Run]:
    """The runs that `render_conversation` encodes separately; raises the same errors, except the last."""
    if train_on not in get_args(TrainOn):
        raise ToolkitError(f"train_on is {train_on!r}; use one of {', '.join(get_args(TrainOn))}")
    contents = _contents(messages)
    roles = tuple(message["role"] for message in messages)
    parts = layout(roles, bool(add_generation_prompt), template_of(tokenizer))
    turns = {part.turn for part in parts if part.turn is not None}
    trained = turns if train_on == "all_assistant" else {max(turns, default=None)}
    trained = trained - _left_out(messages)
    runs = _runs(parts, contents, special_ids_of(tokenizer), control_pattern(tokenizer))
    return [(turn is not None and turn in trained, piece) for turn, piece in runs]


def _left_out(messages: Sequence[Mapping[str, Any]]) -> set[int | None]:
    """The indices of the assistant turns with `train: False`, counted from 0."""
    flags: list[bool | None] = []
    for number, message in enumerate(messages, start=1):
        flag = message.get("train")
        if flag not in (None, True, False):
            raise ToolkitError(f"message {number}: train must be true or false, not {flag!r}")
        if message["role"] == "assistant":
            flags.append(flag)
        elif flag:
            raise ToolkitError(f"message {number}: train is true, but only the assistant's turns can be trained")
    return {turn for turn, flag in enumerate(flags) if flag is not None and not flag}


def _contents(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ToolkitError(f"message {number}: {key} must be a string, not {message.get(key)!r}")
    return [message["content"] for message in messages]


def _runs(
    parts: Iterable[Part], contents: list[str], special_ids: dict[str, list[int]], control: re.Pattern[str]
) -> list[tuple[int | None, str | int]]:
    """The pieces to encode separately, as (assistant turn, text), and special tokens, as (assistant turn, id)."""
    runs: list[tuple[int | None, str | int]] = []
    for part in parts:
        if part.kind == "text":
            _join(runs, part.turn, part.text)
        elif part.kind == "content":
            first, *rest = control.split(contents[part.message])
            _join(runs, part.turn, first)
            runs += [(part.turn, piece) for piece in rest]
        else:
            runs += [(part.turn, token) for token in special_ids[part.kind]]
    return runs


def _join(runs: list[tuple[int | None, str | int]], turn: int | None, text: str) -> None:
    """Append `text` to the last piece if that is text of the same turn; otherwise begin a new piece."""
    if runs and runs[-1][0] == turn and isinstance(last := runs[-1][1], str):
        runs[-1] = (turn, last + text)
    else:
        runs.append((turn, text))


def prompt_ids(messages: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids up to the start of the answer, in the tokenizer's own template if it has another one.

    Raises:
        ToolkitError: the template rejects the conversation.
    """
    if has_other_template(tokenizer):
        return own_prompt([dict(message) for message in messages], tokenizer)
    return render_conversation(messages, tokenizer, add_generation_prompt=True)["input_ids"]
