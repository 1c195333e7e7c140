"""SDPA in float32 for low-precision queries, keys and values, on CPUs where float32 is faster (float32_products.py)."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

PIECE = 2**22  # without gradients: query values converted at a time, 16 MiB in float32


class _WideAttention(torch.autograd.Function):
    """Attention [B, H, T, d] without a mask. Saves the low-precision tensors for the backward pass, which halves the
    memory."""

    @staticmethod
    def forward(
        ctx: Any, scaling: float, causal: bool, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        wide = (t.float() for t in (query, key, value))
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, causal, scale=scaling)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.scaling, ctx.causal = scaling, causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, log_sums = ctx.saved_tensors
        wide = (t.float() for t in (grads[0], query, key, value, out))
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *wide, log_sums, 0.0, ctx.causal, scale=ctx.scaling
        )
        return None, None, *(grad.to(query.dtype) for grad in gradients)


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
    if torch.is_grad_enabled() and attention_mask is None and not dropout:
        return _WideAttention.apply(scaling, causal, query, key, value).transpose(1, 2), None
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    values = query.shape[0] * max(query.shape[2], key.shape[2]) * query.shape[3]
    heads = query.shape[1] if torch.is_grad_enabled() else max(1, PIECE // values)
    outs = [
        F.scaled_dot_product_attention(
            *(t.float() for t in part), attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
        ).to(query.dtype)
        for part in zip(*(t.split(heads, dim=1) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(outs, dim=1).transpose(1, 2), None
