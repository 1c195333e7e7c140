"""Causal attention without gradients on a CPU, some queries at a time.

torch's own kernel multiplies small tiles one by one, and needs values as wide as keys. Here a block of queries meets
all keys up to its last one in one batched product, and the weights stay in the CPU's cache. Scores and softmax are
float32.
"""

from typing import Any

import torch
from torch import nn

from .float32_products import fastest_dtype

QUERIES = 64  # of a block
LONG = 256  # tokens; below, torch's kernel is as fast
IN_CACHE = 2**18  # weights of a block: 1 MiB


def in_blocks(query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether this attention is computed here. With AMX torch's kernel is faster in bf16; in float32 it was not
    compared there."""
    if query.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    causal = attention_mask is None and key.shape[2] == query.shape[2] >= LONG
    return causal and not torch.cpu._is_amx_tile_supported()


def block_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Same signature and result as transformers' sdpa attention, without mask and dropout: query, key [B, H, T, d],
    value [B, H, T, V] -> ([B, T, H, V] in the query's dtype, None)."""
    batch, heads, length, _ = query.shape
    q, k, v = (t.flatten(0, 1) for t in (query, key, value))  # [N, T, d]
    out = torch.empty_like(v, dtype=query.dtype, memory_format=torch.contiguous_format)
    together = max(1, IN_CACHE // (QUERIES * length))
    for parts in zip(*(t.split(together) for t in (q, k, v, out)), strict=True):
        _attend(parts, scaling)
    return out.unflatten(0, (batch, heads)).transpose(1, 2), None


def _attend(parts: tuple[torch.Tensor, ...], scaling: float) -> None:
    """parts: q, k [N, T, d], v [N, T, V], and the output [N, T, V] to be filled."""
    q, k, v, out = parts
    q, k, v = q.float() * scaling, k.float().transpose(1, 2), v.to(fastest_dtype(v))
    later = torch.full((QUERIES, QUERIES), -torch.inf).triu_(1)
    for start in range(0, q.shape[1], QUERIES):
        end = min(start + QUERIES, q.shape[1])
        scores = torch.bmm(q[:, start:end], k[..., :end])
        scores[..., start:] += later[: end - start, : end - start]
        out[:, start:end] = torch.bmm(scores.softmax(-1).to(v.dtype), v[:, :end])
