"""`dsv2 chat`: chat with a model, with streamed answers."""

import argparse
import sys
from functools import partial
from typing import Any

from conversations.errors import ToolkitError
from recipes.terminal import is_unicode

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends it."


def chat(arguments: argparse.Namespace) -> int:
    """Answer one prompt, or hold a conversation.

    Raises:
        ToolkitError, ModelError: wrong settings, or the model does not exist.
    """
    if arguments.max_new_tokens < 1:
        raise ToolkitError(f"--max-new-tokens is {arguments.max_new_tokens}; it must be at least 1")
    if arguments.temperature < 0:
        raise ToolkitError(f"--temperature is {arguments.temperature}; it must be 0 or more")
    for name in ("prompt", "system"):
        if not is_unicode(getattr(arguments, name) or ""):
            raise ToolkitError(f"--{name} is not valid UTF-8")
    partner = _Partner(arguments)
    if arguments.prompt is not None:
        partner.answer(arguments.prompt)
        return 0
    if sys.stdin.isatty():
        print(HELP)
    while (text := _read_line()) is not None:
        if text == "/reset":
            partner.reset()
        elif text:
            partner.answer(text)
    return 0


def _read_line() -> str | None:
    """The user's next line; None at the end of input.

    Raises:
        ToolkitError: the input is not in the encoding of standard input.
    """
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError:
        text = "\udc80"
    if not is_unicode(text):
        raise ToolkitError(
            f"standard input is not valid {sys.stdin.encoding.upper()}; send it as UTF-8, or name its encoding in "
            "PYTHONIOENCODING, such as gbk"
        )
    return None if text in ("/exit", "/quit") else text


class _Partner:
    """A model and the conversation so far."""

    def __init__(self, arguments: argparse.Namespace):
        import torch
        from transformers import set_seed

        from conversations.rendering.template import has_other_template
        from conversations.sections import ModelSection
        from deepseek_v2_modeling.loading import check_vocabulary, load_tokenizer, resolve_source
        from deepseek_v2_modeling.training import quiet_libraries
        from recipes.runs.models import load_frozen

        quiet_libraries()
        source = resolve_source(arguments.model)
        self.tokenizer: Any = load_tokenizer(source)
        self.own_template = has_other_template(self.tokenizer)
        if self.own_template:
            print(f"{arguments.model}: uses its own chat template, not DeepSeek-V2's", file=sys.stderr)
        section = ModelSection(path=arguments.model, dtype=arguments.dtype)
        self.model = load_frozen(section, source, "causal_lm")
        check_vocabulary(self.tokenizer, self.model.config, source.tokenizer_dir)
        if torch.cuda.is_available():
            self.model = self.model.to("cuda")
        set_seed(arguments.seed)
        self.settings = arguments
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        system = self.settings.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> None:
        """Stream the model's answer to the terminal and add it to the conversation."""
        import torch

        from deepseek_v2_modeling.inference import end_tokens

        self.messages.append({"role": "user", "content": text})
        prompt = self._prompt_ids()
        ids = torch.tensor([prompt], device=self.model.device)
        sampled = self.settings.temperature > 0
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=sampled,
            temperature=self.settings.temperature if sampled else None,
            top_k=(self.model.generation_config.top_k or 0) if sampled else None,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=end_tokens(self.model, self.tokenizer),
            streamer=_streamer(self.tokenizer),
            logits_processor=[partial(_only_numbers, self.model)],
        )
        said = self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": said})

    def _prompt_ids(self) -> list[int]:
        """Token ids of the conversation up to the start of the answer, in the model's own template if it has one."""
        from conversations.rendering.conversation import render_conversation
        from conversations.rendering.template import own_prompt

        if self.own_template:
            return own_prompt(self.messages, self.tokenizer)
        return render_conversation(self.messages, self.tokenizer, add_generation_prompt=True)["input_ids"]


def _only_numbers(model: Any, ids: Any, scores: Any) -> Any:
    """Return the scores unchanged. Raises ModelError for NaN, which `generate` would turn into an empty answer."""
    import torch

    from deepseek_v2_modeling.inference import finite

    finite(model, "logits", scores.clamp(min=torch.finfo(scores.dtype).min))  # forbidden tokens have -inf
    return scores


def _streamer(tokenizer: Any) -> Any:
    """A streamer that prints an answer word by word, without the leading space that every answer has."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            shown = text if self.begun else text.lstrip()
            self.begun = self.begun or bool(shown)
            super().on_finalized_text(shown, stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
