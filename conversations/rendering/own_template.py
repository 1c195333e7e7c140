"""A model's own chat template, where it is none of those of template.py, with what is trained under it.

What a template writes as the prompt of a turn must be the beginning of what it writes for the whole conversation; what
follows, up to the token that ends the turn, is trained. A template for which this does not hold cannot be used: R1's,
whose prompts end in `<think>`, which its conversations do not have. Of a template that thinks unless told otherwise
(GLM) the other way is taken.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conversations.errors import ToolkitError
from conversations.rendering.template_parts import BOS, EOS, TRAINED_END, TRAINED_START, placeholder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WITHOUT_THINKING = (
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}"  # unless a request asks
)
CONTROL_SHAPE = re.compile(r"<[|｜].+[|｜]>")
_TURNS = ("user", "assistant", "user", "assistant")


@dataclass(frozen=True)
class OwnTemplate:
    """A tokenizer's chat template. bos, eos: its tokens, None for none. end: what the template writes after an answer.
    specials: names and strings of special tokens, which templates refer to."""

    text: str
    bos: str | None
    eos: str | None
    end: str
    specials: tuple[tuple[str, str], ...] = ()
    name = "the model's own template"

    def marked(self, roles: tuple[str, ...], add_generation_prompt: bool) -> str:
        """A conversation with placeholders and marks around what is trained.

        Raises:
            ToolkitError: the template rejects these roles, leaves a message out, or writes a turn differently in a
                prompt than in a conversation.
        """
        messages = [{"role": role, "content": placeholder(index)} for index, role in enumerate(roles)]
        whole = self._rendered(messages, add_generation_prompt)
        for index in range(len(roles)):
            if whole.count(placeholder(index)) != 1:
                raise ToolkitError(f"message {index + 1}: the model's own chat template does not write it once")
        ends_with_answer = bool(roles) and roles[-1] == "assistant" and whole.endswith(placeholder(len(roles) - 1))
        whole += self.end if ends_with_answer and not add_generation_prompt else ""
        for index in reversed([index for index, role in enumerate(roles) if role == "assistant"]):
            whole = self._with_marks(whole, self._rendered(messages[:index], True), index)
        for token, sign in ((self.bos, BOS), (self.eos, EOS)):
            whole = whole.replace(token, sign) if token else whole
        return whole

    def _with_marks(self, whole: str, prompt: str, index: int) -> str:
        place = whole.index(placeholder(index))
        end = place + len(placeholder(index))
        if not (whole.startswith(prompt) and len(prompt) <= place and whole.startswith(self.end, end)):
            raise ToolkitError(
                f"message {index + 1}: the model's own chat template writes this turn differently in a prompt"
            )
        end += len(self.end)
        return f"{prompt}{TRAINED_START}{whole[len(prompt) : end]}{TRAINED_END}{whole[end:]}"

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        asked: dict[str, Any] = {**dict(self.specials), "add_generation_prompt": add_generation_prompt}
        try:
            rendered: Any = render_jinja_template([messages], chat_template=self.text, **asked)
        except Exception as error:  # a template may raise anything
            why = " ".join(str(error).split())
            raise ToolkitError(f"the model's own chat template rejects this conversation: {why}") from error
        return rendered[0][0]


def own_template(tokenizer: "PreTrainedTokenizerBase") -> OwnTemplate | None:
    """The tokenizer's template, if conversations can be trained with it."""
    text = tokenizer.chat_template
    if not isinstance(text, str):
        return None
    return _usable(text, tokenizer) or _usable(WITHOUT_THINKING + text, tokenizer)


def _usable(text: str, tokenizer: "PreTrainedTokenizerBase") -> OwnTemplate | None:
    specials = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    bos, eos = specials.get("bos_token"), specials.get("eos_token")
    template = OwnTemplate(text, bos, eos, "", tuple(sorted(specials.items())))
    try:
        turns = [{"role": role, "content": placeholder(index)} for index, role in enumerate(_TURNS)]
        after_answer = template._rendered(turns, False).partition(placeholder(1))[2]
        end = next((token for token in _control_tokens(tokenizer) if after_answer.startswith(token)), None)
        if end is None:
            return None
        template = OwnTemplate(text, bos, eos, end, template.specials)
        for roles, prompted in ((_TURNS, False), (_TURNS[:3], True), (_TURNS[:2], False), (_TURNS[:1], True)):
            template.marked(roles, prompted)
    except ToolkitError:
        return None
    return template


def _control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Added tokens that are special or look so, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or CONTROL_SHAPE.fullmatch(token.content)}
    return sorted(filter(None, found), key=lambda token: (-len(token), token))
