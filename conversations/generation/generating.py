"""Generates a model's answers to prompts, applying its generation_config."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from conversations.answers.prompts import answer_text
from conversations.generation.decoding import adjustment, obeyed
from conversations.row import Row
from deepseek_v2_modeling.inference import AfterTurn, Finished, Stops, end_tokens, generate_answers

_BYTES_OF_A_CHARACTER = 4


class Generated(NamedTuple):
    """An answer. finished: whether it ends with an end token or a stop string rather than being cut at max_new_tokens.
    tokens: its length, including the end token. turns: its messages, in an environment, of which `text` is the last.
    reward: what the environment gives for it."""

    text: str
    finished: bool
    tokens: int
    turns: list[Row] | None = None
    reward: float | None = None


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded. temperature: 0 is greedy. stop: strings before which it ends. settings: fields of a
    generation_config that count instead of the model's, such as top_p."""

    temperature: float
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


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


def stop_test(tokenizer: Any, stop: Sequence[str]) -> Stops | None:
    """Whether an answer's ids so far hold one of these strings. Only their end is decoded: as many tokens as the
    longest string has bytes, and some for a character that begins before it."""
    if not stop:
        return None
    tail = max(len(text.encode()) for text in stop) + _BYTES_OF_A_CHARACTER

    def holds_one(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(ids[-tail:], skip_special_tokens=True)
        return any(one in text for one in stop)

    return holds_one


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these strings, in the way of lm-eval: each one cuts what the earlier ones left."""
    for one in stop:
        text = text.split(one)[0]
    return text


def sample_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    decoding: Decoding,
    batch_size: int,
    on_answer: Callable[[int, Generated], object] | None = None,
) -> list[Generated]:
    """One answer per prompt (token ids, ending where the answer begins), each sampled with its own seed; its text as
    decoded. `on_answer` is called with the place and the answer as soon as one is finished."""
    ends, stop = end_tokens(model, tokenizer), decoding.stop

    def as_answer(ids: list[int]) -> Generated:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        cut = cut_at(text, stop)
        return Generated(cut, ids[-1] in ends or cut != text, len(ids))

    finished = None if on_answer is None else lambda place, ids: on_answer(place, as_answer(ids))
    answers = sample_ids(model, tokenizer, prompts, seeds, decoding, batch_size, finished=finished)
    return [as_answer(ids) for ids in answers]


def sample_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    decoding: Decoding,
    batch_size: int,
    *,
    finished: Finished | None = None,
    after_turn: AfterTurn | None = None,
) -> list[list[int]]:
    """The token ids of one answer per prompt, each sampled with its own seed. after_turn: as `generate_answers` takes
    it, for answers of several turns."""
    ends = end_tokens(model, tokenizer)
    return generate_answers(
        model,
        prompts,
        pad_token_id=padding_of(tokenizer),
        eos_token_id=ends,
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        batch_size=batch_size,
        seeds=seeds,
        adjust=adjustment({**obeyed(model), **decoding.settings}, decoding.temperature, ends),
        stops=stop_test(tokenizer, decoding.stop),
        finished=finished,
        after_turn=after_turn,
    )


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
) -> list[Generated]:
    """One answer per prompt (token ids, ending where the answer begins), each sampled with its own seed."""
    decoding = Decoding(temperature, max_new_tokens, tuple(stop))
    answers = sample_answers(model, tokenizer, prompts, seeds, decoding, batch_size)
    return [answer._replace(text=answer_text(answer.text)) for answer in answers]
