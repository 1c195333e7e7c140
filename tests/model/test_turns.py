"""Answers of several turns: what follows a turn is read on top of the cache. They are those of plain forwards."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v2_modeling import record_routing
from deepseek_v2_modeling.batching import evaluation_mode
from deepseek_v2_modeling.decode_steps import SlotDecoder, chunks
from deepseek_v2_modeling.generation import generate_answers
from deepseek_v2_modeling.inference import record_answers
from deepseek_v2_modeling.sampling import choose_tokens, draws

from ..helpers.models import random_ids, small_model

MODEL = small_model()
VOCABULARY = MODEL.config.vocab_size
ENDS = frozenset(range(0, VOCABULARY, 9))
LENGTH = 48
ASKED: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": ENDS, "max_new_tokens": LENGTH}


def following(index: int, so_far: Sequence[int]) -> list[int]:
    """What follows a turn: of a length that depends on it, nothing after the third turn and after some others."""
    turns, size = sum(token in ENDS for token in so_far), (7 * so_far[0] + len(so_far)) % 23
    return [] if turns > 3 else [1 + (index + place) % 7 for place in range(size)]


def after_turn(indices: Sequence[int], answers: Sequence[Sequence[int]]) -> list[list[int]]:
    return [following(index, answer) for index, answer in zip(indices, answers, strict=True)]


def alone(index: int, prompt: list[int], seed: int, temperature: float) -> list[int]:
    """An answer by plain forwards over everything so far."""
    answer, numbers = list[int](), draws([seed], LENGTH)[0]
    while len(answer) < LENGTH:
        with torch.no_grad(), evaluation_mode(MODEL):
            logits = MODEL(torch.tensor([prompt + answer]), use_cache=False).logits[:, -1]
        answer.append(int(choose_tokens(logits, temperature, numbers[None, len(answer)])))
        if answer[-1] in ENDS:
            new = following(index, answer) if len(answer) < LENGTH else []
            if not new or len(answer) + len(new) >= LENGTH:
                break
            answer += new
    return answer


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=7),
    slots=st.integers(1, 4),
    temperature=st.sampled_from([0.0, 1.0, 1.7]),
    adjusted=st.booleans(),
)
def test_turns_are_those_of_plain_forwards(lengths: list[int], slots: int, temperature: float, adjusted: bool):
    prompts = [random_ids(1, length, vocab=VOCABULARY, seed=length)[0].tolist() for length in lengths]
    seeds = [100 + i for i in range(len(lengths))]

    def adjust(ids: Sequence[torch.Tensor], starts: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        seen.update((start, tuple(row.tolist())) for row, start in zip(ids, starts, strict=True))
        return logits / (temperature or 1.0)

    seen = set[tuple[int, tuple[int, ...]]]()
    found = generate_answers(
        MODEL, prompts, temperature=temperature, seeds=seeds, batch_size=slots, after_turn=after_turn, **ASKED,
        adjust=adjust if adjusted else None,
    )  # fmt: skip
    assert found == [alone(i, prompt, seeds[i], temperature) for i, prompt in enumerate(prompts)]
    if adjusted:
        assert {(len(p), tuple(p + a[:-1])) for p, a in zip(prompts, found, strict=True)} <= seen


def test_a_turn_reads_its_new_tokens_alone(monkeypatch: pytest.MonkeyPatch):
    """Each token of an answer goes through the model once: those of earlier turns are in the cache."""
    read = list[int]()
    real_step, real_read = SlotDecoder.__call__, SlotDecoder.read

    def reading(decoder: SlotDecoder, slots: Sequence[int], ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        read.extend(real.sum(-1).tolist())
        return real_read(decoder, slots, ids, real)

    def step(decoder: SlotDecoder, tokens: torch.Tensor) -> torch.Tensor:
        read.append(1)
        return real_step(decoder, tokens)

    monkeypatch.setattr(SlotDecoder, "read", reading)
    monkeypatch.setattr(SlotDecoder, "__call__", step)
    (answer,) = generate_answers(MODEL, [[3, 4, 5]], temperature=1.0, seeds=[2], after_turn=after_turn, **ASKED)
    assert max(read) > 1 and sum(read) == len(answer) - 1


def test_records_tell_sampled_tokens_from_read_ones():
    """Log-probabilities are NaN where a token was not sampled; each token but the last has the experts that read it."""
    prompts = [random_ids(1, n, vocab=VOCABULARY, seed=n)[0].tolist() for n in (3, 5, 5, 6)]
    given = set[tuple[int, int]]()

    def noting(indices: Sequence[int], answers: Sequence[Sequence[int]]) -> list[list[int]]:
        new = after_turn(indices, answers)
        for index, answer, tokens in zip(indices, answers, new, strict=True):
            given.update((index, len(answer) + place) for place in range(len(tokens)))
        return new

    with record_answers() as record:
        found = generate_answers(MODEL, prompts, temperature=1.0, seeds=range(4), after_turn=noting, **ASKED)
    for index, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
        with torch.no_grad(), record_routing(MODEL) as routes:
            logits = MODEL(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
        logps = torch.tensor(record.logps[index])
        unsampled = [(index, place) in given for place in range(len(answer))]
        assert logps.isnan().tolist() == unsampled
        torch.testing.assert_close(logps[~logps.isnan()], expected[~logps.isnan()], atol=2e-5, rtol=1e-4)
        experts = torch.stack([layer[0] for layer in routes[0]], dim=1)[len(prompt) : -1].sort(-1).values
        assert torch.equal(torch.stack(record.routes[index]).long().sort(-1).values, experts)
    assert given


@pytest.mark.parametrize("tokens", [1, 15, 16, 40])
def test_chunks_cover_all_tokens(tokens: int):
    parts = chunks(MODEL.config, tokens)
    assert parts[0][0] == 0 and parts[-1][1] == tokens
    assert all(end == start for (_, end), (start, _) in pairwise(parts))
    assert max(end - start for start, end in parts) == min(tokens, 15)
