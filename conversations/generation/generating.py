"""Generates a model's answers to prompts, applying its generation_config."""

import hashlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from conversations.answers.prompts import answer_text
from conversations.generation.decoding import adjustment, obeyed
from deepseek_v2_modeling.inference import end_tokens, generate_answers


class Generated(NamedTuple):
    """An answer. finished: whether it ends with an end token rather than being cut at max_new_tokens. tokens: its
    length, including the end token."""

    text: str
    finished: bool
    tokens: int


def seed_of(*parts: object) -> int:
    """The seed of one sampled answer, derived from all that it depends on: the recipe's seed, the row number, ..."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:7], "big")


def padding_of(tokenizer: Any) -> int:
    """The id to pad with: the padding token's, or the end token's if the tokenizer has no padding token."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def print_obeyed(stage: str, model: Any) -> None:
    """Print the settings of the model's generation_config that are applied, if any."""
    if fields := obeyed(model):
        settings = ", ".join(f"{field} {value}" for field, value in fields.items())
        print(f"{stage}: applying the model's generation_config: {settings}", file=sys.stderr, flush=True)


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
) -> list[Generated]:
    """One answer per prompt (token ids, ending where the answer begins), each sampled with its own seed."""
    ends = end_tokens(model, tokenizer)
    answers = generate_answers(
        model,
        prompts,
        pad_token_id=padding_of(tokenizer),
        eos_token_id=ends,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        seeds=seeds,
        adjust=adjustment(obeyed(model), temperature, ends),
    )
    return [
        Generated(answer_text(tokenizer.decode(ids, skip_special_tokens=True)), ids[-1] in ends, len(ids))
        for ids in answers
    ]
