"""The chat templates of DeepSeek-V2 and its family, which of them or of a model's own (own_template.py) a tokenizer's
conversations are rendered with, and the layout of a conversation under it.

`chat_template.jinja` is the released template (tokenizer_config.json of DeepSeek-V2-Chat); it is saved with models as
it is. `chat_template_v3.jinja` renders system, user and assistant as DeepSeek-V3's released one does, which also has
tools. For training they are rendered with `{% generation %}` around the trained part of a conversation: the content (in
DeepSeek-V2's with the space before it) and eos_token. Only transformers knows that tag; plain jinja2 and minijinja,
which other servers use, reject it.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from conversations.errors import ToolkitError
from conversations.rendering.own_template import OwnTemplate, own_template
from conversations.rendering.template_parts import (
    BOS,
    EOS,
    TRAINED_END,
    TRAINED_START,
    Part,
    placeholder,
    split_rendered,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
GENERATION = "{% generation %}"


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

    def marked(self, roles: tuple[str, ...], add_generation_prompt: bool) -> str:
        """A conversation with placeholders and marks around what is trained."""
        messages = [{"role": role, "content": placeholder(index)} for index, role in enumerate(roles)]
        return _compiled(self).render(
            messages=messages, bos_token=BOS, eos_token=EOS, add_generation_prompt=add_generation_prompt
        )


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

# tokenizer -> (its chat template and tokens when it was looked at, what `usable_template` found)
_looked_at: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, Template | OwnTemplate | None]]" = (
    WeakKeyDictionary()
)


@cache
def _read(file: str) -> str:
    return Path(__file__).with_name(file).read_text(encoding="utf-8")


def chat_template() -> str:
    """The text of DeepSeek-V2's template, as it is saved with its checkpoints."""
    return DEFAULT.text


def training_template() -> str:
    """The template with `{% generation %}` around trained text, for `apply_chat_template`; renders the same text."""
    return DEFAULT.training_text


def usable_template(tokenizer: "PreTrainedTokenizerBase") -> Template | OwnTemplate | None:
    """The template of ours that renders as the tokenizer's own, else its own if conversations can be trained with it;
    None if it has none, or one that cannot be used."""
    own = tokenizer.chat_template
    state = (own, tokenizer.bos_token, tokenizer.eos_token)
    seen, template = _looked_at.get(tokenizer, (None, None))
    if own and seen != state:
        alike = next((known for known in TEMPLATES.values() if _renders_alike(own, known, tokenizer)), None)
        template = alike or own_template(tokenizer)
        _looked_at[tokenizer] = (state, template)
    return template if own else None


def template_of(tokenizer: "PreTrainedTokenizerBase") -> Template | OwnTemplate:
    """The template by which conversations are rendered: the tokenizer's own if it can be used, else DeepSeek-V2's."""
    return usable_template(tokenizer) or DEFAULT


def has_other_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer has a template that conversations cannot be rendered with."""
    return bool(tokenizer.chat_template) and usable_template(tokenizer) is None


def install_template(tokenizer: "PreTrainedTokenizerBase", model_type: str = "deepseek_v2") -> Template | OwnTemplate:
    """Give `tokenizer` the template that its own renders as, or its own if it can be used, otherwise that of its
    model's family, and return it, so that checkpoints saved with it render the same everywhere. The text of one with
    more than that, such as tools, is kept. The token with which its own template ends an answer becomes the end token.
    A tokenizer without a template that lacks the family's control tokens gets DeepSeek-V2's template, which needs none.
    """
    known = usable_template(tokenizer)
    if isinstance(known, OwnTemplate):
        tokenizer.chat_template, tokenizer.eos_token = known.text, known.end
        return template_of(tokenizer)
    template = known or TEMPLATES.get(model_type, DEFAULT)
    if not set(template.control) <= set(tokenizer.get_vocab()):
        template = DEFAULT
    if known in (None, DEFAULT) or GENERATION in str(tokenizer.chat_template):
        tokenizer.chat_template = template.text
    return template


def answers_without_thought(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether prompts end where a thought is over, so that an answer cannot begin with one."""
    last = layout(("user",), True, template_of(tokenizer))[-1]
    return last.text.rstrip().endswith("</think>")


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
    roles: tuple[str, ...], add_generation_prompt: bool = False, template: Template | OwnTemplate = DEFAULT
) -> tuple[Part, ...]:
    """The parts of a conversation whose messages have these roles.

    Raises ToolkitError for a role that the template does not know (it would silently drop the message).
    """
    for number, role in enumerate(roles, start=1):
        if role not in ROLES:
            raise ToolkitError(f"message {number}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    return tuple(split_rendered(template.marked(roles, add_generation_prompt)))


@cache
def _compiled(template: Template):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The two block settings are those of transformers' apply_chat_template.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    marks = {"{% generation %}": TRAINED_START, "{% endgeneration %}": TRAINED_END}
    marked = template.training_text
    for mark, sign in marks.items():
        marked = marked.replace(mark, sign)
    return environment.from_string(marked)


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
