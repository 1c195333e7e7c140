"""The chat template of DeepSeek-V2, from its one file, and the layout of a conversation under it.

`chat_template.jinja` is the released template (tokenizer_config.json of DeepSeek-V2-Chat); it is saved with models as
it is. For training it is rendered with `{% generation %}` around ' ' + content + eos_token, the trained part of a
conversation. Only transformers knows that tag; plain jinja2 and minijinja, which other servers use, reject it.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conversations.errors import ToolkitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")

# Unicode noncharacters as placeholders. User text never passes through the template, so none of it can be mistaken for
# a placeholder.
_BOS, _EOS, _TRAINED_START, _TRAINED_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_CONTENT_START, _CONTENT_END = "\ufdd4", "\ufdd5"
_ANSWER = "{{ 'Assistant: ' + message['content'] + eos_token }}"
_TRAINED_ANSWER = "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
_MARKER = re.compile(f"([{_BOS}{_EOS}{_TRAINED_START}{_TRAINED_END}]|{_CONTENT_START}[0-9]+{_CONTENT_END})")


@dataclass(frozen=True)
class Part:
    """One piece of a rendered conversation, in order.

    kind: "text" (the template's own, in `text`), "content" (of message number `message`), or the special token "bos" or
    "eos". turn: the index of the assistant turn whose trained text includes this piece; None if it is not trained.
    """

    kind: Literal["text", "content", "bos", "eos"]
    turn: int | None
    text: str = ""
    message: int = -1


@lru_cache(maxsize=1)
def chat_template() -> str:
    """The template's text, as it is saved with every checkpoint."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def training_template() -> str:
    """The template with `{% generation %}` around trained text, for `apply_chat_template`; renders the same text."""
    assert chat_template().count(_ANSWER) == 1
    return chat_template().replace(_ANSWER, _TRAINED_ANSWER)


def has_other_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer has a template that renders differently from DeepSeek-V2's."""
    return bool(tokenizer.chat_template) and not _renders_alike(tokenizer.chat_template, tokenizer)


def install_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give `tokenizer` our template, so that checkpoints saved with it render the same everywhere."""
    tokenizer.chat_template = chat_template()


def own_prompt(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token ids of a prompt by the tokenizer's own template. Raises ToolkitError if the template rejects it."""
    try:
        text: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a foreign template may raise anything
        why = " ".join(str(error).split())
        raise ToolkitError(f"the model's own chat template rejects this conversation: {why}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=1024)
def layout(roles: tuple[str, ...], add_generation_prompt: bool = False) -> tuple[Part, ...]:
    """The parts of a conversation whose messages have these roles.

    Raises ToolkitError for a role that the template does not know (it would silently drop the message).
    """
    for number, role in enumerate(roles, start=1):
        if role not in ROLES:
            raise ToolkitError(f"message {number}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    messages = [{"role": role, "content": f"{_CONTENT_START}{index}{_CONTENT_END}"} for index, role in enumerate(roles)]
    rendered = _compiled_template().render(
        messages=messages, bos_token=_BOS, eos_token=_EOS, add_generation_prompt=add_generation_prompt
    )
    return tuple(_split_rendered(rendered))


@lru_cache(maxsize=1)
def _compiled_template():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The two block settings are those of transformers' apply_chat_template.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    marks = {"{% generation %}": _TRAINED_START, "{% endgeneration %}": _TRAINED_END}
    marked = training_template()
    for mark, sign in marks.items():
        marked = marked.replace(mark, sign)
    return environment.from_string(marked)


def _split_rendered(rendered: str):
    turns = count()
    turn: int | None = None
    for piece in filter(None, _MARKER.split(rendered)):
        if piece == _TRAINED_START:
            turn = next(turns)
        elif piece == _TRAINED_END:
            turn = None
        elif piece == _BOS:
            yield Part("bos", turn)
        elif piece == _EOS:
            yield Part("eos", turn)
        elif piece.startswith(_CONTENT_START):
            yield Part("content", turn, message=int(piece[1:-1]))
        else:
            yield Part("text", turn, text=piece)


def _renders_alike(template: Any, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a template renders a conversation with every role, and a prompt, as ours does."""
    probe = [{"role": role, "content": f"words of {role}"} for role in (*ROLES, "user")]
    try:
        by_template, by_ours = (
            tokenizer.apply_chat_template(probe, chat_template=text, tokenize=False, add_generation_prompt=True)
            for text in (template, chat_template())
        )
    except Exception:  # a foreign template may raise anything for a role: then it differs
        return False
    return by_template == by_ours
