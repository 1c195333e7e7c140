"""Small models of DeepSeek-V2's family, by name."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as ocr
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig

from deepseek_v2_modeling.family import config_class
from deepseek_v2_modeling.model_classes import model_class

from .models import SMALL, YARN

V3: dict[str, Any] = {
    **SMALL, "model_type": "deepseek_v3", "topk_method": "noaux_tc", "n_routed_experts": 16, "norm_topk_prob": True,
    "q_lora_rank": 12, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
PLAIN: dict[str, Any] = {
    **{k: v for k, v in SMALL.items() if k not in ("q_lora_rank", "rope_scaling")},
    "use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0,
    "num_key_value_heads": 2,
}  # fmt: skip
# What DeepSeekMoE's config.json does not have.
OF_V2 = ("topk_method", "n_group", "topk_group", "routed_scaling_factor", "use_mla", "kv_lora_rank",
         "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # fmt: skip
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
    "plain": {**PLAIN, "model_type": "deepseek_v2"},
    "moe": {
        **{k: v for k, v in PLAIN.items() if k not in OF_V2},
        "model_type": "deepseek",
        "num_key_value_heads": None,
        "rope_theta": 500.0,
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


class StockPlain(ocr.DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """A language model on the only backbone of stock with plain attention and DeepSeek's experts, a part of
    DeepSeek-OCR 2."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = ocr.DeepseekOcr2TextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, directory: Path, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A directory in the hub's layout, whatever its model_type."""
        hub = get_checkpoint_conversion_mapping("deepseek_v2")
        assert hub is not None
        register_checkpoint_conversion_mapping("deepseek_ocr2_text", hub, overwrite=True)
        values = json.loads((Path(directory) / "config.json").read_text())
        dense = values["first_k_dense_replace"]
        kinds = ["dense"] * dense + ["sparse"] * (values["num_hidden_layers"] - dense)
        known = {k: v for k, v in values.items() if k in DeepseekOcr2TextConfig().to_dict() and k != "model_type"}
        config = DeepseekOcr2TextConfig(**{**known, "mlp_layer_types": kinds})
        return super().from_pretrained(directory, config=config, **kwargs)

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        outputs = self.model(input_ids=input_ids, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
