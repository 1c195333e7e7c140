"""What a model's generation_config asks of decoding besides the temperature, for batches of our own loop.

`dsv2 chat` goes through transformers' `generate`, which obeys generation_config; so does evaluation, by the same
processors in the same order. Greedy or sampled, and at which temperature, is the task's to say.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# field -> (values that change nothing, (value, prompt's length, end tokens) -> processor), in transformers' order.
Make = Callable[[Any, int, Any], Any]
_ALWAYS: dict[str, tuple[tuple[Any, ...], Make]] = {
    "sequence_bias": ((None,), lambda value, prompt, ends: SequenceBiasLogitsProcessor(value)),
    "repetition_penalty": ((None, 1.0), lambda value, prompt, ends: RepetitionPenaltyLogitsProcessor(value)),
    "no_repeat_ngram_size": ((None, 0), lambda value, prompt, ends: NoRepeatNGramLogitsProcessor(value)),
    "bad_words_ids": ((None,), lambda value, prompt, ends: NoBadWordsLogitsProcessor(value, ends)),
    "min_length": ((None, 0), lambda value, prompt, ends: MinLengthLogitsProcessor(value, ends)),
    "min_new_tokens": ((None, 0), lambda value, prompt, ends: MinNewTokensLengthLogitsProcessor(prompt, value, ends)),
    "suppress_tokens": ((None,), lambda value, prompt, ends: SuppressTokensLogitsProcessor(value)),
}
_SAMPLED: dict[str, tuple[tuple[Any, ...], Make]] = {
    "top_k": ((None, 0), lambda value, prompt, ends: TopKLogitsWarper(value)),
    "top_p": ((None, 1.0), lambda value, prompt, ends: TopPLogitsWarper(value)),
    "min_p": ((None, 0.0), lambda value, prompt, ends: MinPLogitsWarper(value)),
    "typical_p": ((None, 1.0), lambda value, prompt, ends: TypicalLogitsWarper(value)),
}


def obeyed(model: Any) -> dict[str, Any]:
    """The fields of a model's generation_config that change what is decoded, with their values."""
    config = getattr(model, "generation_config", None)
    fields = {**_ALWAYS, **_SAMPLED}
    values = {field: getattr(config, field, None) for field in fields}
    return {field: value for field, value in values.items() if value not in fields[field][0]}


def adjustment(model: Any, temperature: float, end_tokens: Any) -> Callable[..., torch.Tensor] | None:
    """(token ids so far [1, T], length of the prompt, logits [1, V]) -> logits [1, V], the temperature applied.

    None where generation_config asks for nothing.
    """
    asked = obeyed(model)
    always = {field: value for field, value in asked.items() if field in _ALWAYS}
    sampled = {field: value for field, value in asked.items() if field in _SAMPLED and temperature > 0}
    if not always and not sampled:
        return None

    def adjust(ids: torch.Tensor, prompt_length: int, logits: torch.Tensor) -> torch.Tensor:
        made = [_ALWAYS[field][1](value, prompt_length, end_tokens) for field, value in always.items()]
        if temperature > 0:
            made += [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
            made += [_SAMPLED[field][1](value, prompt_length, end_tokens) for field, value in sampled.items()]
        tokens: Any = ids
        scores: Any = logits.float()
        return LogitsProcessorList(made)(tokens, scores)

    return adjust
