"""The architectures of DeepSeek-V2's family: what differs from DeepSeek-V2 is the defaults and the routing of a config.

Field names and defaults are those of stock transformers, and of the official config where stock lacks a field.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration import SPEED, DeepseekV2Config
from .errors import ModelError


@strict
class DeepseekConfig(DeepseekV2Config):
    """The config of DeepSeekMoE (`model_type` deepseek; arXiv 2401.06066): plain multi-head attention, and the experts
    of DeepSeek-V2 without groups. Stock transformers has no class for it; defaults are the official config's.
    """

    model_type = "deepseek"
    architecture = "DeepSeekMoE"
    topk_methods = {"softmax": ("greedy",)}  # noqa: RUF012
    attentions = (False,)

    num_hidden_layers: int = 30
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0

    def check_own(self) -> None:
        if self.routed_scaling_factor != 1:
            raise ModelError(
                f"routed_scaling_factor is {self.routed_scaling_factor}: the official model has no such setting, so it "
                "must be 1"
            )


@strict
class DeepseekV3Config(DeepseekV2Config):
    """The config of DeepSeek-V3, R1 and Moonlight (`model_type` deepseek_v3).

    Fields beyond DeepSeek-V2's:
        bias_update_speed: u of the update `bias += u * sign(mean load - load)` of the bias that corrects the choice of
            experts, after each training step (arXiv 2408.15664; V3: 0.001, and 0 at the end). 0, the default, keeps it.
        num_nextn_predict_layers: the layers for multi-token prediction that follow the others in a checkpoint. They are
            left out, so it is 0 in what is saved.
    """

    model_type = "deepseek_v3"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers",
    }  # fmt: skip
    architecture = "DeepSeek-V3"
    topk_methods = {"sigmoid": ("noaux_tc",)}  # noqa: RUF012
    attentions = (True,)

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = 1
    n_routed_experts: int | None = 256
    routed_scaling_factor: float | int = 2.5
    n_group: int | None = 8
    topk_group: int | None = 4
    num_experts_per_tok: int | None = 8
    first_k_dense_replace: int = 3
    norm_topk_prob: bool | None = True
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    scoring_func: str = "sigmoid"
    topk_method: str | None = "noaux_tc"
    aux_loss_alpha: float | int = 0.0001  # V3's paper; its config.json says 0.001
    bias_update_speed: float | int = 0.0
    num_nextn_predict_layers: int = 0
    rope_interleave: bool | None = True

    def check_own(self) -> None:
        if self.rope_interleave is False:
            raise ModelError("rope_interleave is false: RoPE on halves, instead of pairs, is not supported")
        if self.bias_update_speed and not self.has_routed_experts:
            raise ModelError(f"{SPEED} is {self.bias_update_speed}: the model has no routed experts; leave it out")

    def validate_architecture(self) -> None:
        """A no-op: with latent attention hidden_size need not be a multiple of the number of heads, as stock wants."""


@strict
class Glm4MoeLiteConfig(DeepseekV3Config):
    """The config of GLM-4.7-Flash (`model_type` glm4_moe_lite).

    mlp_layer_types: "dense" or "sparse" for each layer, instead of first_k_dense_replace; None: the first is dense.
    """

    model_type = "glm4_moe_lite"
    architecture = "GLM-4.7-Flash"

    vocab_size: int = 154880
    hidden_size: int = 2048
    intermediate_size: int = 10240
    moe_intermediate_size: int = 1536
    num_hidden_layers: int = 47
    num_attention_heads: int = 20
    n_routed_experts: int | None = 64
    routed_scaling_factor: float | int = 1.8
    q_lora_rank: int | None = 768
    qk_nope_head_dim: int = 192
    v_head_dim: int = 256
    n_group: int | None = 1
    topk_group: int | None = 1
    num_experts_per_tok: int | None = 4
    first_k_dense_replace: int = 1
    max_position_embeddings: int = 202752
    rms_norm_eps: float = 1e-5
    mlp_layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any):
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["dense"] + ["sparse"] * (self.num_hidden_layers - 1)
        super().__post_init__(**kwargs)

    def check_own(self) -> None:
        kinds = self.mlp_layer_types or []
        if len(kinds) != self.num_hidden_layers or set(kinds) - {"dense", "sparse"}:
            raise ModelError(
                f"mlp_layer_types is {self.mlp_layer_types}: it must be dense or sparse for each of the "
                f"{self.num_hidden_layers} layers"
            )
        super().check_own()

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether a layer is MoE: by `mlp_layer_types`."""
        return bool(self.n_routed_experts) and (self.mlp_layer_types or [])[layer_idx] == "sparse"


@strict
class YoutuConfig(DeepseekV3Config):
    """The config of Youtu-LLM (`model_type` youtu): dense layers with DeepSeek-V3's attention."""

    model_type = "youtu"
    architecture = "Youtu-LLM"

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    max_position_embeddings: int = 131072
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    tie_word_embeddings: bool = True


CONFIGS: dict[Any, type[DeepseekV2Config]] = {
    config.model_type: config
    for config in (DeepseekV2Config, DeepseekConfig, DeepseekV3Config, Glm4MoeLiteConfig, YoutuConfig)
}


def config_class(model_type: Any) -> type[DeepseekV2Config]:
    """The config's class; DeepSeek-V2's for an unknown model_type, which its `from_dict` refuses."""
    return CONFIGS.get(model_type if isinstance(model_type, str) else None, DeepseekV2Config)


def config_fields() -> set[str]:
    """The names of all settings that a config of the family may have."""
    return {name for config in CONFIGS.values() for name in config().to_dict()}


def check_bias_updates(config: Any, why_not: str | None) -> None:
    """Raise ModelError if biases are to be updated where they cannot; why_not: the reason, None where they can."""
    if why_not and getattr(config, SPEED, 0):
        raise ModelError(
            f"model.config.{SPEED} is {getattr(config, SPEED)}: {why_not}; set it to 0, and let aux_loss_alpha balance "
            "the experts' load"
        )
