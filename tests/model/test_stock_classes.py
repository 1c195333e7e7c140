"""Where we say nothing about stock's class it agrees with ours, and where we say something it differs or fails."""

from typing import Any

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as stock

from deepseek_v2_modeling import DeepseekV2ForCausalLM
from deepseek_v2_modeling.checkpoints.stock_classes import stock_differences

from ..helpers.models import YARN, logits_of, random_ids, small_config, small_model

IDS = random_ids(1, 12)
PLAIN_YARN = {name: value for name, value in YARN.items() if not name.startswith("mscale")}


def stock_logits(changes: dict[str, Any], ours: Any) -> torch.Tensor | None:
    """Of stock's class with our weights and settings; None if it cannot be built or takes other weights."""
    try:
        theirs = small_model(stock.DeepseekV2ForCausalLM, **changes)
        theirs.load_state_dict(ours.state_dict())
    except (TypeError, RuntimeError):
        return None
    return logits_of(theirs, IDS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"norm_topk_prob": True}, ["norm_topk_prob"]),
        ({"norm_topk_prob": True, "num_experts_per_tok": 1}, []),
        ({"norm_topk_prob": True, "first_k_dense_replace": 3}, []),
        ({"moe_layer_freq": 2}, ["moe_layer_freq"]),
        ({"moe_layer_freq": 2, "num_hidden_layers": 3, "first_k_dense_replace": 2}, []),
        ({"n_shared_experts": None}, ["n_shared_experts"]),
        ({"n_routed_experts": None}, ["n_routed_experts"]),
        ({"rope_scaling": None}, []),
        ({"rope_scaling": PLAIN_YARN}, []),
        ({"rope_scaling": {**PLAIN_YARN, "mscale": 1.0}}, []),
        ({"rope_scaling": {**PLAIN_YARN, "mscale": 0.707}}, ["mscale 0.707"]),
        ({"rope_scaling": {**PLAIN_YARN, "mscale_all_dim": 0.707}}, ["mscale_all_dim 0.707"]),
        ({"rope_scaling": {**YARN, "attention_factor": 1.5}}, ["attention_factor 1.5"]),
        ({"norm_topk_prob": True, "n_shared_experts": 0}, ["norm_topk_prob", "n_shared_experts"]),
    ],
)  # fmt: skip
def test_each_difference_is_named_and_nothing_else(changes: dict[str, Any], named: list[str]):
    said = stock_differences(small_config(**changes))
    assert len(said) == len(named) and all(name in text for name, text in zip(named, said, strict=True))
    ours = small_model(DeepseekV2ForCausalLM, **changes)
    theirs = stock_logits(changes, ours)
    agrees = theirs is not None and torch.allclose(theirs, logits_of(ours, IDS), rtol=0, atol=1e-4)
    assert agrees == (not named)
