"""Floating-point operations of a training step, and how long they take."""

from deepseek_v2_modeling import DeepseekV2Config
from deepseek_v2_modeling.training import Sizes, Weight

FORWARD = 2  # operations of a weight and token: multiply and add
BACKWARD = 2  # for the gradient of the input, and as many for that of the weight


def flops_per_token(settings: DeepseekV2Config, sizes: Sizes, length: float) -> float:
    """Operations of the forward and backward pass of one token in sequences of `length` tokens, recomputation not
    counted (as usual for model FLOPs utilisation, MFU). A frozen weight has no gradient of its own."""
    share = (settings.num_experts_per_tok or 0) / (settings.n_routed_experts or 1)

    def of(weight: Weight) -> float:
        if weight.unit == "root" and weight.module.startswith("embed_tokens"):
            return 0.0
        values = weight.values * (share if weight.routed else 1)
        return values * (FORWARD + BACKWARD + (BACKWARD if weight.trained else 0))

    widths = settings.attention_sizes.qk + settings.attention_sizes.value
    attended = length / 2  # causal
    attention = settings.num_hidden_layers * settings.num_attention_heads * widths * attended * FORWARD * 3
    return sizes.total(of) + attention


def seconds(flops: float, gpus: int, teraflops: float, mfu: float) -> float:
    """How long so many operations take on GPUs with a peak of `teraflops` each, of which a share `mfu` is used."""
    return flops / (gpus * teraflops * 1e12 * mfu)
