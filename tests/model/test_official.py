"""Settings that the golden sets do not show, against a transcription of the official code."""

from typing import Any

import pytest
import torch

from deepseek_v2_modeling.layers.rope import RotaryEmbedding

from ..helpers import official
from ..helpers.models import SMALL, YARN, logits_of, random_ids, small_config, small_model
from .test_config import official_tables

LINEAR = {"type": "linear", "factor": 3.0, "mscale_all_dim": 0.5}
DEFAULTS = {"rms_norm_eps": 1e-6, "norm_topk_prob": False, "moe_layer_freq": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "device-limited": {},
    "device-limited and normalised": {"norm_topk_prob": True},
    "greedy and normalised": {"topk_method": "greedy", "n_group": None, "topk_group": None, "norm_topk_prob": True},
    "greedy with groups in the config": {"topk_method": "greedy", "n_group": 4, "topk_group": 1},
    "one expert, normalised": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "one group of one expert": {"num_experts_per_tok": 1, "n_group": 8, "topk_group": 1},
    "all experts": {"num_experts_per_tok": 8, "topk_group": 4},
    "no dense layer": {"first_k_dense_replace": 0},
    "every second layer": {"first_k_dense_replace": 0, "moe_layer_freq": 2},
    "dense only": {"n_routed_experts": None},
    "no shared experts": {"n_shared_experts": None},
    "scaling of 0": {"routed_scaling_factor": 0},
    "q_lora and biases": {"q_lora_rank": 12, "attention_bias": True},
    "biases without q_lora": {"attention_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "another eps": {"rms_norm_eps": 0.1, "q_lora_rank": 12},
    "odd widths": {"qk_nope_head_dim": 6, "qk_rope_head_dim": 10, "v_head_dim": 5, "kv_lora_rank": 7},
    "no YaRN": {"rope_scaling": None, "rope_theta": 500.0},
    "linear": {"rope_scaling": LINEAR},
    "YaRN with defaults": {"rope_scaling": {"type": "yarn", "factor": 8.0}},
    "YaRN, mscale only": {"rope_scaling": {"type": "yarn", "factor": 8.0, "mscale": 0.7}},
    "YaRN, mscale_all_dim only": {"rope_scaling": {"type": "yarn", "factor": 8.0, "mscale_all_dim": 0.7}},
    "YaRN, short": {"rope_scaling": {**YARN, "original_max_position_embeddings": 16, "mscale": 1.0}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_logits(name: str):
    """With random biases and norms too, and positions at which every frequency has turned."""
    settings = {**SMALL, **DEFAULTS, **SETTINGS[name]}
    model, ids = small_model(**settings), random_ids(1, 24)
    for i, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(i))
    with torch.no_grad():
        wanted = official.logits(model.state_dict(), settings, ids[0].tolist())
    torch.testing.assert_close(logits_of(model, ids)[0], wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    # decoded with a cache, the last ones absorbed
    outputs = model(ids[:, :20], use_cache=True)
    last = [model(ids[:, t : t + 1], past_key_values=outputs.past_key_values).logits[0, 0] for t in range(20, 24)]
    torch.testing.assert_close(torch.stack(last), wanted[20:], rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("width", [4, 64])
def test_tables_to_128k(width: int):
    """The angles at the last positions are large: any other order of the float32 products would show."""
    positions = torch.tensor([0, 1, 4095, 4096, 65535, 131070, 131071])
    config = small_config(qk_rope_head_dim=width)
    found = RotaryEmbedding(config)(positions.unsqueeze(0))
    for ours, wanted in zip(found, official_tables(YARN, width, 131072), strict=True):
        torch.testing.assert_close(ours[0], wanted[positions], rtol=0, atol=1e-6)
