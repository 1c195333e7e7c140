"""Causal attention on a CPU, some queries at a time.

torch's own kernel multiplies small tiles one by one, and needs values as wide as keys. Here a block of queries, of many
heads, meets all keys up to its last one in one batched product, and the weights stay in the CPU's cache. Scores and
softmax are float32. The backward pass computes the weights again, from the scores' log-sums (Dao et al. 2022,
FlashAttention).

N heads, T query tokens, S keys, of which the queries are the last T, V width of a head's values.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .float32_products import fastest_dtype

QUERIES = 64  # of a block; in the backward pass twice as many
IN_CACHE = 2**20  # weights of a block, of all heads together
WORTH = {4: 2**20, 2: 2**16}  # weights of a row of a batch, by bytes a value; with fewer torch's kernel is as fast


def in_blocks(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, continues: bool, dropout: float
) -> bool:
    """Whether this attention is computed here, which does not depend on the number of rows in the batch. With AMX
    torch's kernel is faster in bf16; in float32 it was not compared there. continues: whether the mask only says that
    the queries are the last of the keys' tokens."""
    if query.device.type != "cpu" or dropout or torch.compiler.is_compiling():
        return False
    causal = continues or (attention_mask is None and key.shape[2] == query.shape[2])
    worth = query.shape[1] * query.shape[2] * key.shape[2] >= WORTH.get(query.itemsize, math.inf)
    return causal and worth and not torch.cpu._is_amx_tile_supported()


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
    return _BlockAttention.apply(scaling, query, key, value), None


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scaling: float, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):  # it would round the scores
            for heads in _heads(QUERIES, query, key, value, out, log_sums):
                _attend(scaling, *heads)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.scaling = scaling
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, log_sums = ctx.saved_tensors
        found = [torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            for heads in _heads(2 * QUERIES, query, key, value, grads[0].transpose(1, 2), out, log_sums, *found):
                _pull_back(ctx.scaling, *heads)
        return None, *found


def _heads(queries: int, query: torch.Tensor, key: torch.Tensor, *others: torch.Tensor) -> Iterator[Any]:
    """Of tensors [B, H, ...], as many heads [N, ...] at a time as have IN_CACHE weights for a block of queries. Tensors
    to be filled are contiguous."""
    together = max(1, IN_CACHE // (min(queries, query.shape[2]) * key.shape[2]))
    return zip(*(t.flatten(0, 1).split(together) for t in (query, key, *others)), strict=True)


def _attend(
    scaling: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, log_sums: torch.Tensor
) -> None:
    """Fill out [N, T, V] and log_sums [N, T] from q [N, T, d], k [N, S, d], v [N, S, V]."""
    before = k.shape[1] - q.shape[1]
    q, k, v = q.float(), k.float().transpose(1, 2), v.to(fastest_dtype(v))
    unread = q.new_empty(1)  # what would be added to the products
    later = torch.full((QUERIES, QUERIES), -torch.inf).triu_(1)
    for start in range(0, q.shape[1], QUERIES):
        end = min(start + QUERIES, q.shape[1])
        scores = torch.baddbmm(unread, q[:, start:end], k[..., : before + end], beta=0, alpha=scaling)
        scores[..., before + start :] += later[: end - start, : end - start]
        highest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(highest).exp_()
        sums = weights.sum(-1, keepdim=True)
        log_sums[:, start:end] = (highest + sums.log()).squeeze(-1)
        out[:, start:end] = torch.bmm(weights.to(v.dtype), v[:, : before + end]) / sums


def _pull_back(
    scaling: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Fill the gradients dq, dk and dv, from that of out, g [N, T, V].

    The scores' log-sums and the rows' sums of g * out are further columns of the products, so that a product gives the
    logarithms of the weights, rounded by their own size and not by that of the scores. These are smallest in the middle
    between one key and all keys alike, so weights are computed times a power of two of about the root of the number of
    keys, and g divided by it.
    """
    wide, before = fastest_dtype(q), k.shape[1] - q.shape[1]
    doublings_T = torch.arange(before + 1, before + q.shape[1] + 1).log2().div_(2).round_()
    g_sums = (g.float() * out.float()).sum(-1)
    g = (g * torch.exp2(-doublings_T).unsqueeze(1)).to(wide)
    q, k, v = (t.to(wide) for t in (q, k, v))
    ones = k.new_ones(*k.shape[:2], 2)
    q_less = torch.cat((q, _in_two((doublings_T * math.log(2) - log_sums) / scaling, wide)), -1)
    g_less = torch.cat((g, _in_two(-g_sums * torch.exp2(-doublings_T), wide)), -1)
    k_ones, v_ones = (torch.cat((t, ones), -1).transpose(1, 2) for t in (k, v))
    sums_k, sums_v = torch.zeros(k.shape), torch.zeros(v.shape)
    unread = q.new_empty(1)
    for start in range(0, q.shape[1], 2 * QUERIES):
        end = min(start + 2 * QUERIES, q.shape[1])
        queries, keys = slice(start, end), slice(0, before + end)
        weights = torch.baddbmm(unread, q_less[:, queries], k_ones[..., keys], beta=0, alpha=scaling).exp_()
        weights[..., before + start :].tril_()
        sums_v[:, keys] += torch.bmm(weights.transpose(1, 2), g[:, queries])
        d_scores = weights.mul_(torch.bmm(g_less[:, queries], v_ones[..., keys]))
        dq[:, queries] = torch.baddbmm(unread, d_scores, k[:, keys], beta=0, alpha=scaling)
        sums_k[:, keys] += torch.bmm(d_scores.transpose(1, 2), q[:, queries])
    dk.copy_(sums_k.mul_(scaling))
    dv.copy_(sums_v)


def _in_two(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [N, T] in float32 as [N, T, 2], the sum of two numbers of `dtype`."""
    coarse = x.to(dtype)
    return torch.stack((coarse, (x - coarse.float()).to(dtype)), -1)
