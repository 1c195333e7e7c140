"""What latent and plain attention have in common: queries, keys and values -> the kernel that attends them.

B batch, T query tokens, S cached and new tokens, H heads, V width of a head's values.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration import DeepseekV2Config
from ..kernels.block_attention import block_attention, in_blocks
from ..kernels.float32_attention import wide_attention
from ..kernels.float32_products import widens
from ..packing.last_tokens import Places
from .attention_plan import AttentionPlan

SAME_WIDTH = ("sdpa", "flash_attention_2", "flash_attention_3")  # kernels that need V as wide as Q and K


class AttentionBlock(nn.Module):
    """The attention of a layer, of either kind; the kernels of transformers read these attributes.

    scaling: the factor on q.k (`rope.softmax_scale`), which is the same in all layers.
    """

    def __init__(self, config: DeepseekV2Config, layer_idx: int, scaling: float):
        super().__init__()
        self.config, self.layer_idx, self.scaling, self.is_causal = config, layer_idx, scaling, True

    def returned(self, weights: torch.Tensor | None) -> torch.Tensor | None:
        """The weights with eager attention; other implementations return none."""
        return weights if (self.config._attn_implementation or "eager") == "eager" else None


def at_places(x: torch.Tensor, read: Places | None) -> torch.Tensor:
    """x [B, T, ...], or if there are places [R] to be read, those alone: [1, R, ...]."""
    return x if read is None else x[read][None]


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention with softmax in float32, as in the official model: ([B, T, H, V], weights [B, H, T, S])."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def attend_with_narrow_values(
    kernel: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    continues: bool = False,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention where V may be narrower than Q and K, for which kernels fall back to a quadratic path or fail: in
    blocks of our own where these are faster, otherwise by the kernel, with V padded and the output sliced. continues:
    whether the mask only says that the queries are the last of the keys' tokens."""
    if in_blocks(query, key, attention_mask, continues, dropout):
        return block_attention(module, query, key, value, attention_mask, **kwargs)
    width = value.shape[-1]
    padded = F.pad(value, (0, query.shape[-1] - width)) if width < query.shape[-1] else value
    out, weights = kernel(module, query, key, padded, attention_mask, dropout=dropout, **kwargs)
    return out[..., :width], weights


def attend(
    module: AttentionBlock,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query [B, H, T, W], key [B, H, S, W], value [B, H, S, V] -> ([B, T, H, V], weights [B, H, T, S] or None)."""
    implementation = module.config._attn_implementation or "eager"
    if plan.absorb:  # few tokens, with a mask that only these two accept
        bias = None if plan.mask is None else torch.where(plan.mask, 0.0, torch.finfo(key.dtype).min).to(key.dtype)
        if implementation == "eager":
            return eager_attention(module, query, key, value, bias, module.scaling)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=module.scaling)
        return out.transpose(1, 2), None
    kernel: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    if implementation == "sdpa" and widens(key, key.shape[-2]):
        kernel = wide_attention
    if implementation in SAME_WIDTH:
        kernel = partial(attend_with_narrow_values, kernel)
    dropout = module.config.attention_dropout if module.training else 0.0
    attend = partial(kernel, module, scaling=module.scaling, dropout=dropout, **kwargs)
    if plan.layout is None:
        out, weights = attend(query, key, value, plan.mask)
    else:
        out, weights = plan.layout.attend(partial(attend, attention_mask=None), query, key, value), None
    return out, weights
