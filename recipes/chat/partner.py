"""A model and its conversation. The latent cache is kept between turns, so a turn reads only its own new tokens."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteriaList, set_seed
from transformers.generation.streamers import BaseStreamer

from conversations.errors import ToolkitError
from conversations.rendering.conversation import prompt_ids
from conversations.rendering.template import has_other_template, install_template
from conversations.sections import ModelSection
from deepseek_v2_modeling import LatentCache
from deepseek_v2_modeling.inference import end_tokens, finite
from deepseek_v2_modeling.loading import check_vocabulary, load_tokenizer, resolve_source
from recipes.runs.models import load_frozen

Show = Callable[[str], object]


@dataclass(frozen=True)
class Answer:
    """text: without the space that begins every answer. tokens: length of the answer, including an end token.
    used: tokens of the whole conversation after it. limit: the model's maximum. ending: how the answer ended; "end"
    if the model ended it itself."""

    text: str
    tokens: int
    seconds: float
    used: int
    limit: int
    ending: str

    @property
    def mark(self) -> str:
        """Why the answer is not complete; empty if it is."""
        return {
            "end": "",
            "stopped": "stopped",
            "length": f"cut after {self.tokens:,} tokens; raise --max-new-tokens for more",
            "context": f"cut: the context of {self.limit:,} tokens is full",
        }[self.ending]


class Partner:
    """A model and the conversation with it so far (`messages`)."""

    def __init__(self, path: str, settings: argparse.Namespace):
        """Load the model of a directory or a run.

        Args:
            settings: dtype, seed, system, temperature and max_new_tokens of the command line.

        Raises:
            ToolkitError, ModelError: the model does not exist, or its files cannot be read.
        """
        source = resolve_source(path)
        self.name = path
        self.tokenizer: Any = load_tokenizer(source)
        self.own_template = has_other_template(self.tokenizer)
        section = ModelSection(path=path, dtype=settings.dtype)
        model = load_frozen(section, source, "causal_lm")
        check_vocabulary(self.tokenizer, model.config, source.tokenizer_dir)
        if not self.own_template:
            install_template(self.tokenizer, model.config.model_type)
        self.model = model.to("cuda") if torch.cuda.is_available() else model
        set_seed(settings.seed)
        self.temperature: float = settings.temperature
        self.max_new_tokens: int = settings.max_new_tokens
        self.limit: int = model.config.max_position_embeddings
        self.messages: list[dict[str, str]] = []
        self._cache: LatentCache | None = None
        self._cached: list[int] = []
        self.set_system(settings.system)

    def set_system(self, text: str | None) -> None:
        """Replace the system message; None or an empty text removes it."""
        turns = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *turns]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def undo(self) -> bool:
        """Forget the last question and its answer; False if there is none."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            del self.messages[-2:]
            return True
        return False

    def answer(self, text: str, show: Show, stopped: Callable[[], bool] = lambda: False) -> Answer:
        """Answer `text` and add both to the conversation.

        Args:
            show: called with each piece of the answer as it is generated.
            stopped: called after every token; true ends the answer there.

        Raises:
            ToolkitError: the conversation is longer than the model's context; it stays as it was before.
            ModelError: the logits contain NaN.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.read(text)
        room = self.limit - len(prompt)
        start = time.monotonic()
        ids = self._generate(prompt, min(room, self.max_new_tokens), _Streamer(self.tokenizer, show), stopped)
        reply = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return Answer(
            reply, len(ids), time.monotonic() - start, len(prompt) + len(ids), self.limit, self._ending(ids, room)
        )

    def read(self, text: str) -> list[int]:
        """The ids of the conversation with `text` as its next turn.

        Raises:
            ToolkitError: the conversation is longer than the model's context.
        """
        prompt = prompt_ids([*self.messages, {"role": "user", "content": text}], self.tokenizer)
        if len(prompt) >= self.limit:
            raise ToolkitError(
                f"the conversation has {len(prompt):,} tokens with this prompt, which leaves no room for an answer: "
                f"{self.name} takes at most {self.limit:,} (max_position_embeddings)"
            )
        return prompt

    def _ending(self, ids: list[int], room: int) -> str:
        if ids and ids[-1] in end_tokens(self.model, self.tokenizer):
            return "end"
        if len(ids) == room:
            return "context"
        return "length" if len(ids) == self.max_new_tokens else "stopped"

    def _generate(
        self, prompt: list[int], max_new_tokens: int, streamer: BaseStreamer, stopped: Callable[[], bool]
    ) -> list[int]:
        cache, self._cache = self._cache_for(prompt), None  # an interrupted forward leaves a cache of unequal layers
        ids = torch.tensor([prompt], device=self.model.device)
        sampled = self.temperature > 0
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=sampled,
            temperature=self.temperature if sampled else None,
            top_k=(self.model.generation_config.top_k or 0) if sampled else None,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=end_tokens(self.model, self.tokenizer),
            streamer=streamer,
            logits_processor=[partial(_only_numbers, self.model)],
            stopping_criteria=StoppingCriteriaList([lambda ids, scores: _every_row(ids, stopped())]),
        )
        written = output[0].tolist()
        self._cache, self._cached = cache, written[: cache.get_seq_length()]
        return written[len(prompt) :]

    def _cache_for(self, prompt: list[int]) -> LatentCache:
        """The cache, cropped to the longest prefix that `prompt` shares with the conversation so far.

        At least one token is left to process. An answer that is re-encoded differently from how it was generated is
        processed again.
        """
        if self._cache is None:
            return LatentCache(self.model.config)
        pairs = zip(self._cached, prompt[:-1], strict=False)
        shared = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self._cached), len(prompt) - 1))
        self._cache.crop(shared - len(self._cached))
        return self._cache


class _Streamer(BaseStreamer):
    """Shows text as soon as its characters are complete, without the space that begins every answer.

    window: the tokens that are decoded together: those since the last complete character and one before, since some
    tokenizers treat the space before the first token differently. length: of its text, what has been shown.
    """

    def __init__(self, tokenizer: Any, show: Show):
        self.tokenizer, self.show = tokenizer, show
        self.window: list[int] = []
        self.length = 0
        self.prompt_seen = self.begun = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.window += value.flatten().tolist()
        text = self._text()
        complete = text.removesuffix("\ufffd")  # possibly the first bytes of a character
        self._show(complete)
        if complete == text:
            self.window = self.window[-1:]
            self.length = len(self._text())

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self.window, skip_special_tokens=True)

    def _show(self, text: str) -> None:
        piece, self.length = text[self.length :], max(self.length, len(text))
        piece = piece if self.begun else piece.lstrip()
        if piece:
            self.begun = True
            self.show(piece)


def _every_row(ids: torch.Tensor, stop: bool) -> torch.Tensor:
    return torch.full((len(ids),), stop, device=ids.device)


def _only_numbers(model: Any, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the scores unchanged. Raises ModelError for NaN, which `generate` would turn into an empty answer."""
    finite(model, "logits", scores.clamp(min=torch.finfo(scores.dtype).min))  # forbidden tokens have -inf
    return scores
