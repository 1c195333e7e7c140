"""What stock transformers computes differently from a checkpoint's config.

Programs without this package, and those that look classes up by `architectures` inside transformers (its own
`transformers serve`), run stock's class on our checkpoints. docs/model.md compares the two.
"""

from collections.abc import Callable

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..configuration import DeepseekV2Config
from ..family import Glm4MoeLiteConfig, YoutuConfig
from ..layers.rope import rope_magnitude

ROPE_SETTINGS = ("mscale", "mscale_all_dim", "attention_factor")  # those that stock combines differently

NO_CLASS = "stock transformers has no class"


def stock_differences(config: DeepseekV2Config) -> tuple[str, ...]:
    """The settings of a config that stock transformers ignores or reads differently, a sentence for each; empty if its
    class computes the same."""
    if not config.uses_latents:
        return (f"{NO_CLASS} for {config.architecture} with plain attention: programs need one of their own for it",)
    return tuple(text for check in CHECKS if (text := check(config)))


def _normalised_gate(config: DeepseekV2Config) -> str | None:
    chosen = config.num_experts_per_tok or 0
    if not (config.has_routed_experts and config.norm_topk_prob):
        return None
    if config.scoring_func == "sigmoid":  # stock's class of DeepSeek-V3 reads it
        more = "norm_topk_prob is true with one expert per token: stock transformers normalises its weight to 1"
        return more if chosen == 1 else None
    if chosen == 1:
        return None
    return "norm_topk_prob is true: stock transformers ignores it, and scales the experts' weights instead"


def _moe_layers(config: DeepseekV2Config) -> str | None:
    if isinstance(config, Glm4MoeLiteConfig | YoutuConfig):  # stock's classes read mlp_layer_types, or have no experts
        return None
    if all(config.is_moe_layer(i) for i in range(config.first_k_dense_replace, config.num_hidden_layers)):
        return None
    if not config.n_routed_experts:
        return "n_routed_experts is not set: stock transformers cannot build a model without routed experts"
    return f"moe_layer_freq is {config.moe_layer_freq}: stock transformers ignores it, and misses the dense layers"


def _shared_experts(config: DeepseekV2Config) -> str | None:
    if config.n_shared_experts or not config.has_routed_experts:
        return None
    return "n_shared_experts is not set: stock transformers cannot build a model without shared experts"


def _yarn_magnitude(config: DeepseekV2Config) -> str | None:
    """Compared as numbers: stock's own function says what its class multiplies cos and sin by."""
    rope = config.rope
    if rope["rope_type"] != "yarn":
        return None
    _, stock = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = rope_magnitude(rope)
    if abs(stock - ours) < 1e-6:
        return None
    given = " and ".join(f"{name} {rope[name]}" for name in ROPE_SETTINGS if rope.get(name) is not None)
    return (
        f"rope_scaling has {given}: stock transformers multiplies cos and sin by {stock:.4g}, the official model by "
        f"{ours:.4g}"
    )


CHECKS: tuple[Callable[[DeepseekV2Config], str | None], ...] = (
    _normalised_gate,
    _moe_layers,
    _shared_experts,
    _yarn_magnitude,
)
