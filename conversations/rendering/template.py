"""The chat templates of DeepSeek-V2 and its family, and the layout of a conversation under one of them.

`chat_template.jinja` is the released template (tokenizer_config.json of DeepSeek-V2-Chat); it is saved with models as
it is. `chat_template_v3.jinja` renders system, user and assistant as DeepSeek-V3's released one does, which also has
tools. For training they are rendered with `{% generation %}` around the trained part of a conversation: the content (in
DeepSeek-V2's with the space before it) and eos_token. Only transformers knows that tag; plain jinja2 and minijinja,
which other servers use, reject it.
"""

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from conversations.errors import ToolkitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
GENERATION = "{% generation %}"

# Unicode noncharacters as placeholders. User text never passes through the template, so none of it can be mistaken for
# a placeholder.
_BOS, _EOS, _TRAINED_START, _TRAINED_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_CONTENT_START, _CONTENT_END = "\ufdd4", "\ufdd5"
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


@dataclass(frozen=True)
class Template:
    """A released chat template. file: its text, next to this module; answer: what it writes for the assistant's turn,
    and trained_answer: the same with `{% generation %}` around the trained part; control: tokens that it writes, which
    a tokenizer must have."""

    name: str
    file: str
    answer: str
    trained_answer: str
    control: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return _read(self.file)

    @property
    def training_text(self) -> str:
        assert self.text.count(self.answer) == 1
        return self.text.replace(self.answer, self.trained_answer)


# By model_type; a type without an entry is rendered as DeepSeek-V2.
TEMPLATES = {
    "deepseek_v2": Template(
        "DeepSeek-V2",
        "chat_template.jinja",
        "{{ 'Assistant: ' + message['content'] + eos_token }}",
        "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}",
    ),
    "deepseek_v3": Template(
        "DeepSeek-V3",
        "chat_template_v3.jinja",
        "{{ '<｜Assistant｜>' + message['content'] + eos_token }}",
        "{{ '<｜Assistant｜>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}",
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
}
DEFAULT = TEMPLATES["deepseek_v2"]

# tokenizer -> (its chat template when it was looked at, the template of ours that renders alike; None for another)
_known: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, Template | None]]" = WeakKeyDictionary()


@cache
def _read(file: str) -> str:
    return Path(__file__).with_name(file).read_text(encoding="utf-8")


def chat_template() -> str:
    """The text of DeepSeek-V2's template, as it is saved with its checkpoints."""
    return DEFAULT.text


def training_template() -> str:
    """The template with `{% generation %}` around trained text, for `apply_chat_template`; renders the same text."""
    return DEFAULT.training_text


def known_template(tokenizer: "PreTrainedTokenizerBase") -> Template | None:
    """The template that renders as the tokenizer's own; None if it has none, or another."""
    own = tokenizer.chat_template
    text, template = _known.get(tokenizer, (None, None))
    if own and text != own:
        template = next((known for known in TEMPLATES.values() if _renders_alike(own, known, tokenizer)), None)
        _known[tokenizer] = (own, template)
    return template if own else None


def template_of(tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The template by which conversations are rendered: the tokenizer's own if it is known, else DeepSeek-V2's."""
    return known_template(tokenizer) or DEFAULT


def has_other_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer has a template that renders differently from all that are known."""
    return bool(tokenizer.chat_template) and known_template(tokenizer) is None


def install_template(tokenizer: "PreTrainedTokenizerBase", model_type: str = "deepseek_v2") -> Template:
    """Give `tokenizer` the template that its own renders as, otherwise that of the model's family, and return it, so
    that checkpoints saved with it render the same everywhere. The text of a template with more than that, such as
    tools, is kept. A tokenizer that lacks the family's control tokens, such as Moonlight's, gets DeepSeek-V2's
    template, which needs none.
    """
    known = known_template(tokenizer)
    template = known or TEMPLATES.get(model_type, DEFAULT)
    if not set(template.control) <= set(tokenizer.get_vocab()):
        template = DEFAULT
    if known in (None, DEFAULT) or GENERATION in str(tokenizer.chat_template):
        tokenizer.chat_template = template.text
    return template


def own_prompt(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token ids of a prompt by the tokenizer's own template. Raises ToolkitError if the template rejects it."""
    try:
        text: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a foreign template may raise anything
        why = " ".join(str(error).split())
        raise ToolkitError(f"the model's own chat template rejects this conversation: {why}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=1024)
def layout(
    roles: tuple[str, ...], add_generation_prompt: bool = False, template: Template = DEFAULT
) -> tuple[Part, ...]:
    """The parts of a conversation whose messages have these roles.

    Raises ToolkitError for a role that the template does not know (it would silently drop the message).
    """
    for number, role in enumerate(roles, start=1):
        if role not in ROLES:
            raise ToolkitError(f"message {number}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    messages = [{"role": role, "content": f"{_CONTENT_START}{index}{_CONTENT_END}"} for index, role in enumerate(roles)]
    rendered = _compiled(template).render(
        messages=messages, bos_token=_BOS, eos_token=_EOS, add_generation_prompt=add_generation_prompt
    )
    return tuple(_split_rendered(rendered))


@cache
def _compiled(template: Template):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The two block settings are those of transformers' apply_chat_template.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    marks = {"{% generation %}": _TRAINED_START, "{% endgeneration %}": _TRAINED_END}
    marked = template.training_text
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


def _renders_alike(template: Any, known: Template, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a template renders a conversation with every role, and a prompt, as a known one does."""
    probe = [{"role": role, "content": f"words of {role}"} for role in (*ROLES, "user")]
    try:
        by_template, by_ours = (
            tokenizer.apply_chat_template(probe, chat_template=text, tokenize=False, add_generation_prompt=True)
            for text in (template, known.text)
        )
    except Exception:  # a foreign template may raise anything for a role: then it differs
        return False
    return by_template == by_ours
