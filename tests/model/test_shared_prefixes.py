"""Sequences that begin alike are read as one up to where they differ, to the scores that each has alone."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v2_modeling import DeepseekV2ForSequenceClassification
from deepseek_v2_modeling.inference import score_heads
from deepseek_v2_modeling.shared_prefixes import MIN_SHARED, WORTH, shared_prefixes

from ..helpers.models import random_ids, small_model

PROMPTS = [[token] * (MIN_SHARED + token) for token in (3, 9, 20)]
SEQUENCES = st.lists(
    st.tuples(st.sampled_from([[], *PROMPTS]), st.lists(st.integers(0, 3), min_size=1, max_size=40)).map(
        lambda parts: [*parts[0], *parts[1]]
    ),
    max_size=12,
)


@given(SEQUENCES)
def test_every_sequence_is_in_one_place_and_groups_are_worth_it(sequences: list[list[int]]) -> None:
    groups, rest = shared_prefixes(sequences)
    assert sorted([*rest, *(i for _, group in groups for i in group)]) == list(range(len(sequences)))
    for shared, group in groups:
        rows = [sequences[i] for i in group]
        assert shared >= MIN_SHARED and len(group) > 1
        assert all(row[:shared] == rows[0][:shared] and len(row) > shared for row in rows)
        assert shared + len(rows) * (max(map(len, rows)) - shared) <= WORTH * sum(map(len, rows))


def test_answers_to_different_prompts_do_not_join_by_what_all_share() -> None:
    system = [1] * MIN_SHARED
    prompts = [[*system, *[token] * 200] for token in (5, 6)]
    rows = [[*prompt, token, 2] for prompt in prompts for token in (7, 8, 9)]
    groups, rest = shared_prefixes(rows)
    assert not rest and sorted(group for _, group in groups) == [[0, 1, 2], [3, 4, 5]]
    assert {shared for shared, _ in groups} == {MIN_SHARED + 200}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_each_alone(batch_size: int, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"num_labels": 2, "pad_token_id": 1, "attn_implementation": implementation}
    model: Any = small_model(DeepseekV2ForSequenceClassification, **config).eval()
    prompts = random_ids(2, 100).tolist()
    rows = [[*prompt, *random_ids(1, 3 + 9 * i, seed=i)[0].tolist()] for prompt in prompts for i in range(4)]
    rows += random_ids(2, 30, seed=9).tolist()
    alone = [score_heads(model, [row], pad_token_id=1)[0] for row in rows]
    read = []
    real = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, **more: (
        read.append(input_ids.numel()), real(self, input_ids, **more))[1])  # fmt: skip
    together = score_heads(model, rows, pad_token_id=1, batch_size=batch_size)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=1e-5)
    shared = sum(read) < sum(map(len, rows))
    assert batch_size == 1 or shared is (implementation == "sdpa")  # eager attention would need a mask over all rows
