"""A model's answers to prompts, by the model's generation_config."""

import hashlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from conversations.answers.prompts import answer_text
from conversations.generation.decoding import adjustment, obeyed
from deepseek_v2_modeling.inference import end_tokens, generate_answers


class Generated(NamedTuple):
    """An answer. finished: whether it ends with an end token, and was not cut at max_new_tokens. tokens: its length,
    the end token included."""

    text: str
    finished: bool
    tokens: int


def seed_of(*parts: object) -> int:
    """The seed of one sampled answer, from all that it depends on: the recipe's seed, the number of the row, ..."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:7], "big")


def padding_of(tokenizer: Any) -> int:
    """The id to pad with: that of the end token if the tokenizer has no padding token."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def print_obeyed(stage: str, model: Any) -> None:
    """Print the settings of the model's generation_config that are applied, if there are any."""
    if asked := obeyed(model):
        settings = ", ".join(f"{field} {value}" for field, value in asked.items())
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
    """An answer to each prompt (token ids, up to where the answer begins), sampled with its own seed."""
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
        adjust=adjustment(model, temperature, ends),
    )
    return [
        Generated(answer_text(tokenizer.decode(ids, skip_special_tokens=True)), ids[-1] in ends, len(ids))
        for ids in answers
    ]
