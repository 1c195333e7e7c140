"""Applies a model's generation_config, except for the temperature, in our own generation loop.

`dsv2 chat` uses transformers' `generate`, which applies generation_config; evaluation applies it with the same logits
processors in the same order. Whether to sample, and at which temperature, is set by the task. End tokens are handled by
`end_tokens`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from deepseek_v2_modeling.inference import Adjust


@dataclass(frozen=True)
class Setting:
    """The context of a processor: length of the prompt in tokens, end token ids, and device."""

    prompt: int
    ends: Any
    device: Any


# field -> (neutral values, (value, setting) -> processor), in transformers' order.
Make = Callable[[Any, Setting], Any]
_ALWAYS: dict[str, tuple[tuple[Any, ...], Make]] = {
    "sequence_bias": ((None,), lambda value, at: SequenceBiasLogitsProcessor(value)),
    "repetition_penalty": ((None, 1.0), lambda value, at: RepetitionPenaltyLogitsProcessor(value)),
    "no_repeat_ngram_size": ((None, 0), lambda value, at: NoRepeatNGramLogitsProcessor(value)),
    "bad_words_ids": ((None,), lambda value, at: NoBadWordsLogitsProcessor(value, at.ends)),
    "min_length": ((None, 0), lambda value, at: MinLengthLogitsProcessor(value, at.ends, device=at.device)),
    "min_new_tokens": (
        (None, 0),
        lambda value, at: MinNewTokensLengthLogitsProcessor(at.prompt, value, at.ends, device=at.device),
    ),
    "exponential_decay_length_penalty": (
        (None,),
        lambda value, at: ExponentialDecayLengthPenalty(tuple(value), at.ends, at.prompt),
    ),
    "suppress_tokens": ((None,), lambda value, at: SuppressTokensLogitsProcessor(value, device=at.device)),
    "begin_suppress_tokens": (
        (None,),
        lambda value, at: SuppressTokensAtBeginLogitsProcessor(value, at.prompt, device=at.device),
    ),
}
_SAMPLED: dict[str, tuple[tuple[Any, ...], Make]] = {
    "top_h": ((None,), lambda value, at: TopHLogitsWarper(value)),
    "top_k": ((None, 0), lambda value, at: TopKLogitsWarper(value)),
    "top_p": ((None, 1.0), lambda value, at: TopPLogitsWarper(value)),
    "min_p": ((None, 0.0), lambda value, at: MinPLogitsWarper(value)),
    "typical_p": ((None, 1.0), lambda value, at: TypicalLogitsWarper(value)),
    "epsilon_cutoff": ((None, 0.0), lambda value, at: EpsilonLogitsWarper(value)),
    "eta_cutoff": ((None, 0.0), lambda value, at: EtaLogitsWarper(value, device=at.device)),
}

FIELDS = frozenset({**_ALWAYS, **_SAMPLED})


def obeyed(model: Any) -> dict[str, Any]:
    """The fields of a model's generation_config that affect decoding, with their values."""
    return asked_of(getattr(model, "generation_config", None))


def asked_of(config: Any) -> dict[str, Any]:
    """The fields of a GenerationConfig that affect decoding, with their values."""
    fields = {**_ALWAYS, **_SAMPLED}
    values = {field: getattr(config, field, None) for field in fields}
    return {field: value for field, value in values.items() if value not in fields[field][0]}


def adjustment(asked: Mapping[str, Any], temperature: float, end_tokens: Any) -> Adjust | None:
    """The function to pass as `adjust` to `generate_answers`, or None if it would change nothing.

    Processors of the tokens so far run row by row, since rows differ in length; those that only truncate the
    distribution run on all rows at once.

    Args:
        asked: fields and values, as `asked_of` returns them.
    """
    always = {field: value for field, value in asked.items() if field in _ALWAYS}
    sampled = {field: value for field, value in asked.items() if field in _SAMPLED and temperature > 0}
    if not always and not sampled:
        return None

    @cache
    def by_row(prompt: int, device: Any) -> LogitsProcessorList:
        at = Setting(prompt, end_tokens, device)
        return LogitsProcessorList([_ALWAYS[field][1](value, at) for field, value in always.items()])

    @cache
    def at_once(device: Any) -> LogitsProcessorList:
        warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))] if temperature not in (0, 1) else []
        at = Setting(0, end_tokens, device)
        return LogitsProcessorList(warpers + [_SAMPLED[field][1](value, at) for field, value in sampled.items()])

    def adjust(ids: Sequence[torch.Tensor], prompts: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        scores: Any = logits.float()
        if always:
            rows: Any = zip(ids, prompts, scores, strict=True)
            scores = torch.cat([by_row(prompt, row.device)(tokens[None], row[None]) for tokens, prompt, row in rows])
        nothing: Any = None  # no warper looks at the tokens
        return at_once(scores.device)(nothing, scores)

    return adjust
