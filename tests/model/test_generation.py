"""Answers from slots that are refilled: the same as alone, whatever is sampled beside them, within a cache budget."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v2_modeling import ModelError
from deepseek_v2_modeling.batching import evaluation_mode
from deepseek_v2_modeling.decode_steps import SlotDecoder
from deepseek_v2_modeling.generation import cache_bytes, generate_answers
from deepseek_v2_modeling.sampling import choose_tokens, draws
from deepseek_v2_modeling.shared_prefixes import read_once

from ..helpers.models import random_ids, small_model

MODEL = small_model()
VOCABULARY = MODEL.config.vocab_size
ENDS = frozenset(range(0, VOCABULARY, 9))  # one token in nine: answers of many lengths
ASKED: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": ENDS, "max_new_tokens": 14}


def alone(prompt: list[int], temperature: float, seed: int) -> list[int]:
    """An answer by plain forwards over everything so far."""
    tokens, numbers = list(prompt), draws([seed], ASKED["max_new_tokens"])[0]
    for number in numbers:
        with torch.no_grad(), evaluation_mode(MODEL):
            logits = MODEL(torch.tensor([tokens]), use_cache=False).logits[:, -1]
        tokens.append(int(choose_tokens(logits, temperature, number[None])))
        if tokens[-1] in ENDS:
            break
    return tokens[len(prompt) :]


def prompts_of(lengths: list[int]) -> list[list[int]]:
    """Equal lengths are equal prompts, as in groups of answers."""
    return [random_ids(1, length, vocab=VOCABULARY, seed=length)[0].tolist() for length in lengths]


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=9),
    slots=st.integers(1, 4),
    temperature=st.sampled_from([0.0, 1.0, 1.7]),
    at_once=st.sampled_from([1, 12, 10_000]),
)
def test_answers_do_not_depend_on_what_is_sampled_beside_them(
    lengths: list[int], slots: int, temperature: float, at_once: int
):
    prompts, seeds = prompts_of(lengths), [100 + i for i in range(len(lengths))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepseek_v2_modeling.generation.PREFILL_TOKENS", at_once)
        found = generate_answers(MODEL, prompts, temperature=temperature, seeds=seeds, batch_size=slots, **ASKED)
    assert found == [alone(prompt, temperature, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def test_no_prompts_have_no_answers():
    assert generate_answers(MODEL, [], **ASKED) == []


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the decoder does: the most slots and the most bytes of cache, and rows decoded in vain."""
    seen = {"slots": 0, "bytes": 0, "steps": 0, "rows": 0}
    step = SlotDecoder.__call__

    def counting(decoder: SlotDecoder, tokens: torch.Tensor) -> torch.Tensor:
        logits = step(decoder, tokens)
        seen["slots"], seen["bytes"] = max(seen["slots"], len(tokens)), max(seen["bytes"], decoder.cache.nbytes)
        seen["steps"], seen["rows"] = seen["steps"] + 1, seen["rows"] + len(tokens)
        return logits

    monkeypatch.setattr(SlotDecoder, "__call__", counting)
    return seen


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_the_cache_stays_within_its_budget(rows: int, monkeypatch: pytest.MonkeyPatch):
    seen = watched(monkeypatch)
    prompts = prompts_of([6, 6, 6, 5, 5, 3, 2, 2, 1, 1])
    budget = rows * cache_bytes(MODEL, 6 + 14)
    settings = {**ASKED, "temperature": 1.0, "seeds": range(10), "batch_size": 32}
    bounded = generate_answers(MODEL, prompts, max_cache_bytes=budget, **settings)
    assert seen["slots"] == rows and seen["bytes"] <= budget
    assert bounded == generate_answers(MODEL, prompts, **settings)


def test_a_budget_too_small_for_one_answer_is_an_error():
    one = cache_bytes(MODEL, 6 + 14)
    with pytest.raises(ModelError, match=r"one answer with its prompt, 20 tokens, takes .* GB, which is more than"):
        generate_answers(MODEL, prompts_of([6, 2]), max_cache_bytes=one - 1, **ASKED)


def test_slots_do_not_stand_empty(monkeypatch: pytest.MonkeyPatch):
    """40 answers in 4 slots: nearly every row decoded belongs to an unfinished answer."""
    seen = watched(monkeypatch)
    settings = {**ASKED, "temperature": 1.0, "seeds": range(40), "batch_size": 4}
    answers = generate_answers(MODEL, prompts_of([1 + i % 5 for i in range(40)]), **settings)
    used = sum(len(answer) - 1 for answer in answers)  # the first token is the prefill's
    assert len({len(answer) for answer in answers}) > 4
    assert seen["rows"] <= 1.1 * used + 10


def test_prompts_are_prefilled_once(monkeypatch: pytest.MonkeyPatch):
    """Also when answers to one prompt begin at different times."""
    tokens: list[int] = []
    hook = MODEL.model.embed_tokens.register_forward_hook(
        lambda module, args, out: tokens.append(args[0].numel()) if args[0].shape[1] > 1 else None
    )
    try:
        generate_answers(MODEL, prompts_of([9] * 7 + [5] * 7 + [3] * 7), batch_size=4, **ASKED)
    finally:
        hook.remove()
    assert sum(tokens) <= 9 + 5 + 3 + 4 + 2  # and padding where two are read together


BEGINNINGS = [random_ids(1, 70 + 5 * i, vocab=VOCABULARY, seed=900 + i)[0].tolist() for i in range(2)]


def continued(pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Prompts by (which beginning, length of what follows); none of the beginnings for 2."""
    return [[*(BEGINNINGS[which] if which < 2 else []), *prompts_of([length])[0]] for which, length in pairs]


@settings(max_examples=8)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 8)), min_size=2, max_size=9),
    slots=st.integers(1, 4),
    temperature=st.sampled_from([0.0, 1.0]),
    at_once=st.sampled_from([1, 200, 10_000]),
)
def test_answers_after_a_common_beginning_are_those_of_each_prompt_alone(
    pairs: list[tuple[int, int]], slots: int, temperature: float, at_once: int
):
    prompts, seeds = continued(pairs), [100 + i for i in range(len(pairs))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepseek_v2_modeling.generation.PREFILL_TOKENS", at_once)
        found = generate_answers(MODEL, prompts, temperature=temperature, seeds=seeds, batch_size=slots, **ASKED)
    assert found == [alone(prompt, temperature, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def test_a_common_beginning_is_read_once():
    """By all slots and all that enter later; the longest prompts' group comes first."""
    pairs = [(which, 1 + number) for which in (0, 1) for number in range(6)]
    tokens: list[int] = []
    hook = MODEL.model.embed_tokens.register_forward_hook(
        lambda module, args, out: tokens.append(args[0].numel()) if args[0].shape[1] > 1 else None
    )
    try:
        generate_answers(MODEL, continued(pairs), batch_size=3, **ASKED)
    finally:
        hook.remove()
    assert tokens.count(75) == tokens.count(70) == 1 and tokens[0] == 75
    assert sum(tokens) <= 75 + 70 + 2 * sum(range(1, 7)) + 12  # and padding where some are read together


def test_what_is_read_once_pays():
    """Not a beginning of few tokens or of one prompt, nor one whose prompts are the same but for it."""
    long, rest = BEGINNINGS[0], list(range(1, 9))
    assert read_once([[*long, 1, 2], [*long, 3], [5, 6]]) == [70, 70, 0]
    assert read_once([[*long[:40], 1], [*long[:40], 2]]) == [0, 0]
    assert read_once([[*long, 1]] * 5) == [0] * 5
    assert read_once([[*long, *rest * 9]] * 8 + [[*long, 4]]) == [0] * 9
    assert read_once([[*long, 1]] * 2 + [[*long, 2]] * 2) == [70] * 4


def test_adjusted_logits_are_those_of_each_row(monkeypatch: pytest.MonkeyPatch):
    """`adjust` gets the prompt and answer so far of each row; here it forces an answer that depends on both."""
    prompts = prompts_of([3, 6, 2, 6, 4])

    def adjust(ids: Any, lengths: Any, logits: torch.Tensor) -> torch.Tensor:
        assert len(ids) == len(lengths) == len(logits)
        forced = torch.full_like(logits, -torch.inf)
        for row, (so_far, length) in enumerate(zip(ids, lengths, strict=True)):
            assert so_far[:length].tolist() in prompts
            forced[row, 1 + (int(so_far.sum()) + len(so_far)) % 8] = 0.0
        return forced

    for temperature in (0.0, 1.0):
        found = generate_answers(MODEL, prompts, adjust=adjust, temperature=temperature, batch_size=2, **ASKED)
        for prompt, answer in zip(prompts, found, strict=True):
            row = list(prompt)
            for token in answer:
                assert token == 1 + (sum(row) + len(row)) % 8
                row.append(token)
            assert len(answer) == ASKED["max_new_tokens"]
