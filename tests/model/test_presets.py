"""The presets: what they promise, and that a seed fixes the weights."""

from typing import Any

import pytest
import torch

from deepseek_v2_modeling import DeepseekV2Config, ModelError
from deepseek_v2_modeling.layers.moe import DeepseekV2MoE
from deepseek_v2_modeling.model_classes import model_class
from deepseek_v2_modeling.presets import PRESETS, build_model, preset_config

from ..helpers.models import logits_of, random_ids

MINIS = ("v2-lite-mini", "v2-lite-heads", "v2-mini", "deepseek-moe-mini", "v3-mini", "glm4-moe-lite-mini", "youtu-mini")
LIMITS = {"tiny": 3e6, **dict.fromkeys(MINIS, 60e6)}


def parameters(preset: str) -> int:
    with torch.device("meta"):
        config = preset_config(preset)
        return model_class(config, "causal_lm")(config).num_parameters()


def test_sizes():
    assert set(PRESETS) == set(LIMITS)
    for preset, limit in LIMITS.items():
        assert limit / 10 < parameters(preset) <= limit, preset


def test_tokens_are_in_the_vocabulary():
    """Those of a config's defaults would make transformers warn."""
    for preset in PRESETS:
        config = preset_config(preset)
        ids: list[Any] = [config.bos_token_id, config.eos_token_id]
        assert all(0 <= token < config.vocab_size for token in ids), preset


def test_tiny():
    config = DeepseekV2Config(**PRESETS["tiny"])
    assert config.n_routed_experts is not None and config.n_routed_experts >= 16
    assert config.n_shared_experts is not None and config.n_shared_experts >= 1
    assert config.topk_method == "group_limited_greedy"
    assert config.n_group is not None and config.topk_group is not None and config.topk_group < config.n_group


def test_v2_lite_mini_has_v2_lites_structure():
    config = DeepseekV2Config(**PRESETS["v2-lite-mini"])
    assert config.q_lora_rank is None and config.topk_method == "greedy"
    assert (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok) == (64, 2, 6)
    assert (config.first_k_dense_replace, config.routed_scaling_factor) == (1, 1.0)
    yarn = config.rope_scaling
    assert yarn is not None and (yarn["type"], yarn["factor"], yarn["mscale"]) == ("yarn", 40, 0.707)


def test_v2_mini_has_v2s_structure():
    config = DeepseekV2Config(**PRESETS["v2-mini"])
    assert config.q_lora_rank and config.topk_method == "group_limited_greedy"
    assert (config.n_group, config.topk_group, config.num_experts_per_tok, config.n_shared_experts) == (8, 3, 6, 2)
    assert config.routed_scaling_factor == 16.0
    alphas = (config.aux_loss_alpha, config.device_aux_loss_alpha, config.comm_aux_loss_alpha)
    assert alphas == (0.003, 0.05, 0.02)  # the paper's


def test_v3_mini_has_v3s_structure():
    config = preset_config("v3-mini")
    assert (config.model_type, config.topk_method, config.scoring_func) == ("deepseek_v3", "noaux_tc", "sigmoid")
    assert (config.n_group, config.topk_group, config.num_experts_per_tok, config.n_shared_experts) == (8, 4, 8, 1)
    assert config.q_lora_rank and config.norm_topk_prob and config.routed_scaling_factor == 2.5


def test_a_seed_fixes_the_weights():
    torch.manual_seed(1)
    first = build_model("tiny", seed=5).state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after), "the global generator was moved"
    again, other = build_model("tiny", seed=5).state_dict(), build_model("tiny", seed=6).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    random = [name for name in first if "norm" not in name]
    assert not any(torch.equal(other[name], first[name]) for name in random)


def test_runs_with_the_tokens_of_its_tokenizer():
    model = build_model("tiny", seed=0, vocab_size=61, bos_token_id=0, eos_token_id=1, pad_token_id=1).eval()
    assert (model.config.vocab_size, model.config.bos_token_id, model.config.pad_token_id) == (61, 0, 1)
    assert isinstance(model.model.layers[1].mlp, DeepseekV2MoE)
    assert model.generation_config.eos_token_id == 1
    assert logits_of(model, random_ids(2, 6)).isfinite().all()


def test_unknown_preset():
    with pytest.raises(ModelError, match=r"large.*tiny"):
        build_model("large", seed=0)
