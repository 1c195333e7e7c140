"""Rotary position embedding with YaRN, as in the official model.

Stock transformers differs from the official code, so its functions are not used:
- cos and sin are scaled by mscale(factor, mscale) / mscale(factor, mscale_all_dim), with the official defaults 1 and 0;
  stock does so only if both are set.
- Pairs are interleaved: (0, 1), (2, 3), ... The official code first permutes them into halves. Applied to queries and
  keys alike, this leaves q.k unchanged, so this file rotates the pairs in place.

Plain multi-head attention rotates halves, as Llama's: (0, R/2), (1, R/2 + 1), ...
"""

import math
from typing import Any

import torch
from torch import nn

from ..configuration import DeepseekV2Config
from ..errors import ModelError
from ..kernels.fused import MANY, fused


def yarn_mscale(factor: float, mscale: float) -> float:
    """Official `yarn_get_mscale`: 0.1 * mscale * ln(factor) + 1, and 1 for factors up to 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: DeepseekV2Config) -> float:
    """The factor on q.k: 1/sqrt(qk_head_dim), times mscale(factor, mscale_all_dim)^2 if mscale_all_dim is set."""
    rope = config.rope
    scale = config.attention_sizes.qk**-0.5
    all_dim = rope.get("mscale_all_dim", 0)
    if rope.get("rope_type") != "default" and all_dim:
        scale *= yarn_mscale(rope["factor"], all_dim) ** 2
    return scale


def rope_magnitude(rope: dict[str, Any]) -> float:
    """The factor on cos and sin; 1 without YaRN."""
    if rope["rope_type"] != "yarn":
        return 1.0
    factor = rope["factor"]
    return yarn_mscale(factor, rope.get("mscale", 1)) / yarn_mscale(factor, rope.get("mscale_all_dim", 0))


def inverse_frequencies(config: DeepseekV2Config) -> torch.Tensor:
    """The inverse frequencies [R/2] float32. YaRN blends interpolated and original frequencies by a ramp over the
    dimensions.

    Products are in the official order: at position 131,071 a different rounding would change the fourth digit.
    """
    rope, width = config.rope, config.attention_sizes.rope
    # On the CPU regardless of the default device: a model built on "meta" still needs real values.
    steps = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    powers = rope["rope_theta"] ** steps
    original_frequencies = 1.0 / powers
    if rope["rope_type"] == "default":
        return original_frequencies
    interpolated = 1.0 / (rope["factor"] * powers)
    if rope["rope_type"] == "linear":
        return interpolated
    original = rope.get("original_max_position_embeddings", 4096)

    def dimension_of(rotations: float) -> float:
        return (width * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(dimension_of(rope.get("beta_fast", 32))), 0)
    high = min(math.ceil(dimension_of(rope.get("beta_slow", 1))), width - 1)
    width_of_ramp = (high - low) or 0.001
    ramp = ((torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / width_of_ramp).clamp(0, 1)
    share_of_original = 1.0 - ramp
    return interpolated * (1 - share_of_original) + original_frequencies * share_of_original


class RotaryEmbedding(nn.Module):
    """Maps positions [B, T] to (cos, sin), each [B, T, R/2] float32, including the YaRN magnitude.

    The frequencies are computed in the first forward and are not a buffer, because loading through the meta device or
    casting the model to bf16 would corrupt them.

    Raises:
        ModelError: in a forward, if the config's RoPE settings have changed since the model was created.
    """

    def __init__(self, config: DeepseekV2Config):
        super().__init__()
        self.config, self.made_with = config, config.rope
        self._inverse: torch.Tensor | None = None

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rope = self.config.rope
        if rope != self.made_with:
            raise ModelError(
                f"rope_scaling or rope_theta was changed on a live model, from {self.made_with} to {rope}: they are "
                "fixed when a model is made. Give them to from_pretrained, or change the config before"
            )
        if self._inverse is None or self._inverse.device != position_ids.device:
            self._inverse = inverse_frequencies(self.config).to(position_ids.device)
        angles = position_ids[..., None].float() * self._inverse
        magnitude = rope_magnitude(rope)
        return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate interleaved pairs, in float32: x [B, H, T, R]; cos and sin [B, T, R/2] -> [B, H, T, R] in the dtype of
    x."""
    fuses = torch.compiler.is_compiling() or (x.is_cuda and x.numel() >= MANY)
    if fuses or torch.is_grad_enabled():
        return rotated_pairs(x, cos, sin)
    # The same products as complex numbers, in half as many operations; the compiler knows none.
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin).unsqueeze(1)).flatten(-2).to(x.dtype)


@fused
def rotated_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate` in real numbers."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


@fused
def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves as pairs, in float32: shapes as for `rotate`."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)
