"""Plain multi-head attention, as in Llama (DeepSeekMoE, and DeepSeek-V2 with `use_mla: false`).

B batch, T query tokens, S cached and new tokens, H heads, G key heads, W width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..configuration import AttentionSizes, DeepseekV2Config
from ..kernels.float32_products import Linear
from ..packing.last_tokens import Places
from .attending import AttentionBlock, at_places, attend
from .attention import DeepseekV2Attention
from .attention_plan import AttentionPlan
from .peft_factors import linear
from .rope import rotate_halves


class MultiHeadAttention(AttentionBlock):
    """Multi-head attention with RoPE on halves of all of a head; with fewer key heads than heads, each serves several
    (grouped-query attention)."""

    def __init__(self, config: DeepseekV2Config, layer_idx: int, scaling: float, sizes: AttentionSizes):
        super().__init__(config, layer_idx, scaling)
        hidden, bias, width = config.hidden_size, config.attention_bias, sizes.qk
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.width, self.heads_per_key = width, heads // key_heads
        self.q_proj = Linear(hidden, heads * width, bias=bias)
        self.k_proj = Linear(hidden, key_heads * width, bias=bias)
        self.v_proj = Linear(hidden, key_heads * width, bias=bias)
        self.o_proj = Linear(heads * width, hidden, bias=bias)

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, heads * W] -> [B, heads, T, W]."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        past_key_values: Cache | None = None,
        read: Places | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] -> ([B, T, D], attention weights or None). read: the only tokens [R] of the result, then [1, R,
        D]."""
        query = rotate_halves(self.by_head(linear(self.q_proj, x)), *position_embeddings)
        key = rotate_halves(self.by_head(linear(self.k_proj, x)), *position_embeddings)
        value = self.by_head(linear(self.v_proj, x))
        if past_key_values is not None:
            value, key = self.with_past(value, key, past_key_values)
        if self.heads_per_key > 1:
            key, value = (part.repeat_interleave(self.heads_per_key, dim=1) for part in (key, value))
        out, weights = attend(self, query, key.to(query.dtype), value.to(query.dtype), plan, **kwargs)
        return linear(self.o_proj, at_places(out.flatten(-2), read)), self.returned(weights)

    def with_past(self, value: torch.Tensor, key: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        """Store values and keys [B, G, T, W], and return those of all tokens so far [B, G, S, W]. The cache has one
        entry a token: [B, 1, T, G W]."""
        value, key = (part.transpose(1, 2).flatten(2).unsqueeze(1) for part in (value, key))
        value, key = cache.update(value, key, self.layer_idx)
        return self.by_head(value.squeeze(1)), self.by_head(key.squeeze(1))


# By whether attention is latent.
ATTENTIONS: dict[bool, Callable[..., AttentionBlock]] = {True: DeepseekV2Attention, False: MultiHeadAttention}
