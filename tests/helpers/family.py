"""Small models of DeepSeek-V2's family, by name."""

from typing import Any

import torch

from deepseek_v2_modeling.family import config_class
from deepseek_v2_modeling.model_classes import model_class

from .models import SMALL, YARN

V3: dict[str, Any] = {
    **SMALL, "model_type": "deepseek_v3", "topk_method": "noaux_tc", "n_routed_experts": 16, "norm_topk_prob": True,
    "q_lora_rank": 12, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
MEMBERS: dict[str, dict[str, Any]] = {
    "v3": V3,
    "glm": {
        **V3,
        "model_type": "glm4_moe_lite",
        "n_group": 1,
        "topk_group": 1,
        "v_head_dim": 16,
        "num_attention_heads": 3,
        "rms_norm_eps": 1e-5,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "rope_scaling": None,
    },
    "youtu": {
        **{k: v for k, v in V3.items() if "expert" not in k and "group" not in k},
        "model_type": "youtu",
        "tie_word_embeddings": True,
        "rope_scaling": None,
    },
    "moonlight": {**V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_scaling": None, "rope_theta": 5e4},
}


def member_config(name: str, **changes: Any) -> Any:
    settings = {**MEMBERS[name], **changes}
    return config_class(settings.pop("model_type"))(**settings)


def member(name: str, head: Any = "causal_lm", seed: int = 0, **changes: Any) -> Any:
    """A random float32 model in eval mode, with biases of routers that decide between experts."""
    torch.manual_seed(seed)
    config = member_config(name, **changes)
    model = model_class(config, head)(config).eval()
    spread_biases(model)
    return model


def spread_biases(model: Any, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    for buffer in model.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator) * std)
