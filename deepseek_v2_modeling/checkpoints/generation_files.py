"""Checks a model's generation_config.json against what our decoding supports, before any answer is generated."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..errors import ModelError

FILE = "generation_config.json"
# Fields that request decoding other than greedy or sampled generation of one answer, and their neutral values. With
# other values, transformers would fail, download code, or generate answers that differ from those of an evaluation.
OTHERS: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "diversity_penalty": (0, 0.0),
    "penalty_alpha": (0, 0.0), "dola_layers": (), "prompt_lookup_num_tokens": (), "guidance_scale": (1, 1.0),
    "force_words_ids": (), "constraints": (), "stop_strings": (), "watermarking_config": (), "custom_generate": (),
    "assistant_early_exit": (), "return_dict_in_generate": (False,), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "max_time": (), "remove_invalid_values": (False,),
    "token_healing": (False,), "is_assistant": (False,),
}  # fmt: skip
NUMBERS = (
    "temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens",
)  # fmt: skip
TOKENS = ("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens")
MAKERS: dict[str, Callable[[Any], object]] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": lambda size: NoRepeatNGramLogitsProcessor(size) if size else None,
    "min_length": lambda least: MinNewTokensLengthLogitsProcessor(0, least, 0),
    "min_new_tokens": lambda least: MinNewTokensLengthLogitsProcessor(0, least, 0),
    "bad_words_ids": lambda words: NoBadWordsLogitsProcessor(words, 0),
    "sequence_bias": SequenceBiasLogitsProcessor,
    "suppress_tokens": SuppressTokensLogitsProcessor,
    "begin_suppress_tokens": SuppressTokensLogitsProcessor,
    "exponential_decay_length_penalty": lambda pair: ExponentialDecayLengthPenalty((int(pair[0]), pair[1] + 0.0), 0, 0),
    "eos_token_id": lambda ids: ExponentialDecayLengthPenalty((0, 1.0), ids, 0),
    "top_h": TopHLogitsWarper,
    "top_k": lambda most: TopKLogitsWarper(most) if most else None,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": lambda mass: TypicalLogitsWarper(mass) if mass != 1 else None,
    "epsilon_cutoff": lambda least: EpsilonLogitsWarper(least) if least else None,
    "eta_cutoff": lambda least: EtaLogitsWarper(least) if least else None,
}


def check_generation(base: str, vocab_size: int) -> None:
    """Check the generation_config.json of a model directory, if there is one.

    Raises:
        ModelError: it is not a JSON object, requests an unsupported kind of decoding, or has a value with which
            decoding would fail.
    """
    path = Path(base) / FILE
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable ({error}); fix it or delete it") from error
    for name, neutral in OTHERS.items():
        if values.get(name) is not None and values[name] not in neutral:
            raise ModelError(f"{path}: {name} is {values[name]!r}: this kind of decoding is not supported; remove it")
    for name in NUMBERS:
        value = values.get(name)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ModelError(f"{path}: {name} is {value!r}: it must be a number")
    try:
        GenerationConfig.from_dict(values)
        for name, make in MAKERS.items():
            if values.get(name) is not None:
                make(values[name])
    except Exception as error:  # transformers' own checks cover only some of the values
        raise ModelError(f"{path}: {' '.join(str(error).split())}; correct or remove it") from error
    if outside := [i for name in TOKENS for i in ids_in(values.get(name)) if i >= vocab_size]:
        raise ModelError(f"{path}: token id {outside[0]} is beyond the model's vocabulary of {vocab_size:,}; remove it")


def save_end_token(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a generation_config.json that also ends answers at the tokenizer's end token, if the model's does not: its
    chat template may end them with another token than the base does."""
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    if config is None or tokenizer.eos_token_id in (ends := ids_in(config.eos_token_id)):
        return
    config = copy.deepcopy(config)
    config.eos_token_id = [*ends, tokenizer.eos_token_id]
    config.save_pretrained(str(directory))


def ids_in(value: Any) -> list[int]:
    """The token ids in a nested list: its integers, since biases are floats."""
    if isinstance(value, list):
        return [i for entry in value for i in ids_in(entry)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []
