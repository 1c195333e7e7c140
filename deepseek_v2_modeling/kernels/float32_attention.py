"""SDPA in float32 for low-precision queries, keys and values, on CPUs where float32 is faster (float32_products.py)."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

PIECE = 2**22  # without gradients: query values converted at a time, 16 MiB in float32


def wide_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Same signature and result as transformers' sdpa attention: query, key [B, H, T, d], value [B, H, S, d] ->
    ([B, T, H, d] in the query's dtype, None).

    Without gradients it converts a few heads at a time, to keep the float32 copies small.
    """
    causal = attention_mask is None and query.shape[2] > 1
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    values = query.shape[0] * max(query.shape[2], key.shape[2]) * query.shape[3]
    heads = query.shape[1] if torch.is_grad_enabled() else max(1, PIECE // values)
    with torch.autocast("cpu", enabled=False):  # it would round them again
        outs = [
            F.scaled_dot_product_attention(
                *(t.float() for t in part), attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
            ).to(query.dtype)
            for part in zip(*(t.split(heads, dim=1) for t in (query, key, value)), strict=True)
        ]
    return torch.cat(outs, dim=1).transpose(1, 2), None
