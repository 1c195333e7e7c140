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


def in_blocks(query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, continues: bool) -> bool:
    """Whether this attention is computed here. With AMX torch's kernel is faster in bf16; in float32 it was not
    compared there. continues: whether the mask only says that the queries are the last of the keys' tokens."""
    if query.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    causal = continues or (attention_mask is None and key.shape[2] == query.shape[2])
    return causal and key.shape[2] >= LONG and not torch.cpu._is_amx_tile_supported()


def block_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Same signature and result as transformers' sdpa attention, without dropout: query [B, H, T, d], key [B, H, S, d],
    value [B, H, S, V] -> ([B, T, H, V] in the query's dtype, None). The queries are the last T of S tokens."""
    out = query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[3])
    together = max(1, IN_CACHE // (QUERIES * key.shape[2]))
    for row in zip(query, key, value, out.transpose(1, 2), strict=True):
        for heads in zip(*(t.split(together) for t in row), strict=True):
            _attend(heads, scaling)
    return out, None


def _attend(parts: tuple[torch.Tensor, ...], scaling: float) -> None:
    """parts: q [N, T, d], k [N, S, d], v [N, S, V], and the output [N, T, V] to be filled."""
    q, k, v, out = parts
    before = k.shape[1] - q.shape[1]
    q, k, v = q.float(), k.float().transpose(1, 2), v.to(fastest_dtype(v))
    unread = q.new_empty(1)  # what would be added to the products
    later = torch.full((QUERIES, QUERIES), -torch.inf).triu_(1)
    for start in range(0, q.shape[1], QUERIES):
        end = min(start + QUERIES, q.shape[1])
        scores = torch.baddbmm(unread, q[:, start:end], k[..., : before + end], beta=0, alpha=scaling)
        scores[..., before + start :] += later[: end - start, : end - start]
        out[:, start:end] = torch.bmm(scores.softmax(-1).to(v.dtype), v[:, : before + end])
