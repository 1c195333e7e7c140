"""Scores of experts against a slow transcription of the paper's formulas, and the smallest set of them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v2_modeling import ModelError, apply_lora, lora_config
from deepseek_v2_modeling.esft.choice import smallest_set
from deepseek_v2_modeling.esft.scores import score_experts

from ..helpers.models import random_ids, shake, small_model

ROUTING: dict[str, dict[str, Any]] = {
    "device-limited": {},
    "greedy": {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "normalised": {"norm_topk_prob": True},
}


def gates_of(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """g [T, E] of each MoE layer for one sequence alone: the routers' softmax at the chosen experts, else 0."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, logits: seen.append(logits.softmax(-1)))
        for layer in model.model.layers
        if layer.is_moe
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    config, gates = model.config, []
    for scores in seen:
        g = torch.zeros_like(scores)
        for token, row in enumerate(scores.tolist()):
            size = len(row) // config.n_group
            best = sorted(range(config.n_group), key=lambda d: -max(row[d * size : (d + 1) * size]))
            allowed = [e for d in best[: config.topk_group] for e in range(d * size, (d + 1) * size)]
            chosen = sorted(allowed, key=lambda e: -row[e])[: config.num_experts_per_tok]
            total = sum(row[e] for e in chosen)
            for e in chosen:
                g[token, e] = row[e] / total if config.norm_topk_prob else row[e] * config.routed_scaling_factor
        gates.append(g)
    return gates


@pytest.mark.parametrize("case", ROUTING)
def test_scores_are_the_papers(case: str) -> None:
    """Rows of several lengths in padded batches; every row counts the same, padding does not."""
    model = small_model(**ROUTING[case])
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 9, 9, 4, 1)]
    found = score_experts(model, rows, pad_token_id=1, batch_size=2)
    assert (found.layers, found.rows, found.tokens) == ([1, 2], 5, 26)
    gates = [gates_of(model, row) for row in rows]
    top_k = model.config.num_experts_per_tok
    for place in range(2):
        gate = sum(g[place].double().mean(0) for g in gates) / len(rows)
        token = sum((g[place] > 0).double().mean(0) / top_k for g in gates) / len(rows)
        torch.testing.assert_close(found.shares["gate"][place], gate / gate.sum(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.shares["token"][place], token, rtol=1e-9, atol=1e-9)


def test_an_adapter_is_part_of_the_model() -> None:
    """It is scored with its adapter, and left in the mode that it was in."""
    rows, plain = random_ids(4, 6).tolist(), small_model()
    before = score_experts(plain, rows, pad_token_id=1).shares["gate"]
    model = apply_lora(plain, lora_config(["router"], r=2)).train()
    fresh = score_experts(model, rows, pad_token_id=1).shares["gate"]
    torch.testing.assert_close(fresh, before)
    shake(model, seed=3)
    seen: list[int] = []
    after = score_experts(model, rows, pad_token_id=1, batch_size=3, progress=seen.append).shares["gate"]
    assert (after - before).abs().max() > 0.01 and model.training and seen == [18, 6]


def test_numbers_that_are_not_finite_are_an_error() -> None:
    model = small_model()
    model.model.layers[1].mlp.gate.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match="not all finite"):
        score_experts(model, random_ids(2, 4).tolist(), pad_token_id=1)


scores_of_a_layer = st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any)


@settings(deadline=None, max_examples=200)
@given(scores=scores_of_a_layer, percent=st.integers(1, 100), scale=st.floats(1e-6, 1e3))
def test_smallest_set(scores: list[int], percent: int, scale: float) -> None:
    """Whole numbers, so that there is no rounding: best first, enough, and one fewer would not be enough."""
    chosen = smallest_set([score * scale for score in scores], percent / 100)
    ranked = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    assert chosen == ranked[: len(chosen)]
    needed = percent * sum(scores)
    assert 100 * sum(scores[e] for e in chosen) >= needed
    assert 100 * sum(scores[e] for e in chosen[:-1]) < needed
