"""Small models with the structure of DeepSeek-V2 and its family and random weights, for experiments and tests."""

from typing import Any

import torch

from .configuration import DeepseekV2Config
from .errors import ModelError
from .family import config_class
from .model_classes import model_class
from .modeling import DeepseekV2ForCausalLM

YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip

# The settings of a config; without model_type, of DeepSeek-V2.
PRESETS: dict[str, dict[str, Any]] = {
    # The demo's model: device-limited routing, small enough to train from scratch in minutes on two cores.
    "tiny": {
        "vocab_size": 1856, "hidden_size": 128, "intermediate_size": 384, "moe_intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 16, "q_lora_rank": None, "kv_lora_rank": 64,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 16,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0,
        "aux_loss_alpha": 0.001, "max_position_embeddings": 512, "initializer_range": 0.05,
    },
    # V2-Lite's structure: no q_lora, greedy routing to 6 of 64 experts, 2 shared experts, YaRN.
    "v2-lite-mini": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 128,
        "num_hidden_layers": 6, "num_attention_heads": 8, "q_lora_rank": None, "kv_lora_rank": 128,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy",
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "aux_loss_alpha": 0.001,
        "max_position_embeddings": 163840, "rope_scaling": YARN,
    },
    # V2-Lite's sizes of heads and latent, for which servers have kernels; everything else is small.
    "v2-lite-heads": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 16,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy",
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "aux_loss_alpha": 0.001,
        "max_position_embeddings": 163840, "rope_scaling": YARN,
    },
    # V2's structure: q_lora, routing limited to 3 of 8 groups of experts, routed_scaling_factor 16, YaRN.
    "v2-mini": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 96,
        "num_hidden_layers": 5, "num_attention_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 80,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0,
        "aux_loss_alpha": 0.003, "device_aux_loss_alpha": 0.05, "comm_aux_loss_alpha": 0.02,
        "max_position_embeddings": 163840, "rope_scaling": YARN,
    },
    # DeepSeekMoE's structure: plain attention, greedy routing to 6 of 64 experts, 2 shared experts.
    "deepseek-moe-mini": {
        "model_type": "deepseek", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024,
        "moe_intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "max_position_embeddings": 4096,
        "bos_token_id": 0, "eos_token_id": 1,
    },
    # V3's structure: q_lora, a sigmoid gate with correction biases, routing limited to 4 of 8 groups of experts, YaRN.
    "v3-mini": {
        "model_type": "deepseek_v3", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768,
        "moe_intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 8, "q_lora_rank": 96,
        "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 64,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "n_group": 8, "topk_group": 4,
        "routed_scaling_factor": 2.5, "max_position_embeddings": 163840,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    # GLM-4.7-Flash's structure: V3's gate in one group, values wider than the queries without RoPE.
    "glm4-moe-lite-mini": {
        "model_type": "glm4_moe_lite", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768,
        "moe_intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 5, "q_lora_rank": 96,
        "kv_lora_rank": 64, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64, "n_routed_experts": 64,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "max_position_embeddings": 202752,
        "rope_theta": 1000000.0,
    },
    # Youtu-LLM's structure: dense, tied embeddings.
    "youtu-mini": {
        "model_type": "youtu", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": 6, "num_attention_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "max_position_embeddings": 131072,
        "rope_theta": 1600000.0, "bos_token_id": 0, "eos_token_id": 1,
    },
}  # fmt: skip

_V2 = {
    "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_hidden_layers": 60, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 160,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0,
    "max_position_embeddings": 163840, "rope_scaling": YARN,
}  # fmt: skip
_V2_LITE = {
    **_V2, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "q_lora_rank": None, "n_routed_experts": 64, "topk_method": "greedy", "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.0,
}  # fmt: skip
_V3 = {
    **_V2, "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
del _V3["topk_method"]  # V3's is its own
_MOONLIGHT = {
    **_V3, "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.446, "max_position_embeddings": 8192, "rope_scaling": None, "rope_theta": 50000.0,
}  # fmt: skip
_MOE_16B = {
    "model_type": "deepseek", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 28, "num_attention_heads": 16, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "max_position_embeddings": 4096,
}  # fmt: skip

# The sizes of released models by hub name, to plan runs where the hub is out of reach.
RELEASED: dict[str, dict[str, Any]] = {
    **{
        f"deepseek-ai/{name}": _V2
        for name in (
            "DeepSeek-V2", "DeepSeek-V2-Chat", "DeepSeek-V2-Chat-0628", "DeepSeek-V2.5", "DeepSeek-V2.5-1210",
            "DeepSeek-Coder-V2-Base", "DeepSeek-Coder-V2-Instruct", "DeepSeek-Coder-V2-Instruct-0724",
        )
    },
    **{
        f"deepseek-ai/{name}": _V2_LITE
        for name in (
            "DeepSeek-V2-Lite", "DeepSeek-V2-Lite-Chat", "DeepSeek-Coder-V2-Lite-Base",
            "DeepSeek-Coder-V2-Lite-Instruct",
        )
    },
    **{
        f"deepseek-ai/{name}": _V3
        for name in ("DeepSeek-V3-Base", "DeepSeek-V3", "DeepSeek-V3-0324", "DeepSeek-R1", "DeepSeek-R1-0528")
    },
    **{f"deepseek-ai/deepseek-moe-16b-{kind}": _MOE_16B for kind in ("base", "chat")},
    **{f"moonshotai/Moonlight-16B-A3B{kind}": _MOONLIGHT for kind in ("", "-Instruct")},
    "zai-org/GLM-4.7-Flash": {"model_type": "glm4_moe_lite"},  # the defaults of its config
    **{f"tencent/Youtu-LLM-2B{kind}": {"model_type": "youtu"} for kind in ("", "-Base")},
}  # fmt: skip


def preset_config(preset: str, **changes: Any) -> DeepseekV2Config:
    """The config of a preset. Raises ModelError if there is none of this name."""
    if preset not in PRESETS:
        raise ModelError(f'unknown preset "{preset}": use one of {", ".join(PRESETS)}')
    return _config_of({**PRESETS[preset], **changes})


def released_config(name: str) -> DeepseekV2Config | None:
    """The config of a released model, as far as its sizes go; None for a name that is not in the table."""
    return _config_of(dict(RELEASED[name])) if name in RELEASED else None


def _config_of(settings: dict[str, Any]) -> DeepseekV2Config:
    return config_class(settings.pop("model_type", "deepseek_v2"))(**settings)


def build_model(preset: str, seed: int, **tokens: int) -> DeepseekV2ForCausalLM:
    """A model of a preset with random float32 weights, reproducible by its seed.

    tokens: bos_token_id, eos_token_id and pad_token_id of the tokenizer to use with it.

    Raises:
        ModelError: there is no preset of this name.
    """
    config = preset_config(preset, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config, "causal_lm")(config)
