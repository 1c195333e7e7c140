"""Grouped matrix products: rows sorted by expert, each group of rows times its expert's matrix.

On CUDA this is one ragged kernel; on the CPU one product per expert that has rows, into a shared output. Neither
allocates anything of the size of all experts' weights, unless those weights are trained.

S token-expert slots, E experts, I inputs, O outputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import low_rank
from .float32_products import by_onednn, compute_dtype, onednn_product, widens
from .fused import MANY, fused
from .low_rank import Factors, Share, flattened, shares_of
from .quantized_weights import Storage, Weight, held, opened
from .ragged_products import ragged_gradient, ragged_product

FILL = 32  # rows; the largest block to which groups are padded on a CPU


@dataclass
class ActiveAdapter:
    """One active adapter of one weight: scaling * (dropout(x) a^T) b^T. a [r, I] and b [O, r], or a [E, r, I] and
    b [E, O, r] for experts.

    experts: the experts that a and b contain, if not all; the others have no adapter.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: nn.Module
    experts: tuple[int, ...] | None = None

    def dropped(self, x: torch.Tensor) -> torch.Tensor | None:
        """The adapter's own input dropout(x); None if there is no dropout."""
        return None if isinstance(self.dropout, nn.Identity) else self.dropout(x)

    def factors(self, count: int, x: torch.Tensor) -> Factors:
        """The factors for all of `count` experts, to be added to a product on x."""
        return Factors(self.dropped(x), self.spread(self.a, count), self.spread(self.b, count))

    def held_by(self, held: slice, count: int) -> "ActiveAdapter":
        """The adapter of some experts of `count`."""
        a, b = (self.spread(factor, count)[held] for factor in (self.a, self.b))
        return replace(self, a=a, b=b, experts=None)

    def spread(self, factor: torch.Tensor, count: int) -> torch.Tensor:
        """a or b for all of `count` experts, zero for those without an adapter."""
        if self.experts is None:
            return factor
        chosen = torch.tensor(self.experts, dtype=torch.long, device=factor.device)
        return factor.new_zeros(count, *factor.shape[1:]).index_copy(0, chosen, factor)


def blocks(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, slice of its rows) for every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
            start += count


def looped_product(groups: "Groups", x_SI: torch.Tensor, w_EOI: Weight, shares: Sequence[Share]) -> torch.Tensor:
    """y[rows of e] = x[rows of e] @ w[e]^T plus the adapters' shares, on a CPU: [S, O]. Products are in float32 where
    that is faster (float32_products.py)."""
    y_SO, dtype = x_SI.new_empty(x_SI.shape[0], w_EOI.shape[1]), product_dtype(x_SI, len(w_EOI))
    fast = by_onednn(x_SI) and x_SI.is_contiguous() and w_EOI.is_contiguous()
    for expert, rows in blocks(groups.counts):
        target, x, w = y_SO[rows], x_SI[rows].to(dtype), w_EOI[expert].to(dtype)
        into = target if dtype == y_SO.dtype else None
        y = onednn_product(x, w, into) if fast else torch.mm(x, w.t(), out=into)
        if into is None:
            target.copy_(y)
    y_SO[groups.filled :] = 0
    for share in shares:
        low_rank.add_share(groups.pieces, share, x_SI, y_SO, dtype)
    return y_SO


def looped_gradient(
    groups: "Groups",
    g_SO: torch.Tensor,
    x_SI: torch.Tensor,
    w_EOI: Weight,
    shares: Sequence[Share],
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[Factors]]:
    """The gradients of `looped_product` with respect to x and w (None unless `needs` asks for them) and to the factors
    of the shares."""
    dx_SI = torch.empty_like(x_SI) if needs[0] else None
    dw_EOI = torch.zeros_like(w_EOI) if needs[1] and isinstance(w_EOI, torch.Tensor) else None
    dtype = product_dtype(x_SI, len(w_EOI))
    fast = by_onednn(g_SO) and g_SO.is_contiguous() and w_EOI.is_contiguous()
    for expert, rows in blocks(groups.counts):
        g = g_SO[rows].to(dtype)
        if dx_SI is not None:
            target, w = dx_SI[rows], w_EOI[expert].to(dtype)
            into = target if dtype == dx_SI.dtype else None
            dx = onednn_product(g, w.t(), into) if fast else torch.mm(g, w, out=into)
            if into is None:
                target.copy_(dx)
        if dw_EOI is not None:
            dw_EOI[expert] = torch.mm(g.t(), x_SI[rows].to(dtype))
    if dx_SI is not None:
        dx_SI[groups.filled :] = 0
    gradients = [low_rank.share_gradient(groups.pieces, share, x_SI, g_SO, dx_SI, dtype) for share in shares]
    return dx_SI, dw_EOI, gradients


class _LoopedLinear(torch.autograd.Function):
    """`looped_product` under autograd. storage: how w is stored; tensors: the adapters' `flattened` factors."""

    @staticmethod
    def forward(
        ctx: Any,
        groups: "Groups",
        storage: Storage | None,
        scalings: Sequence[float],
        x_SI: torch.Tensor,
        w: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_SI, w, *tensors)
        ctx.groups, ctx.storage, ctx.scalings = groups, storage, scalings
        return looped_product(groups, x_SI, opened(w, storage), shares_of(scalings, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_SI, w, *tensors = ctx.saved_tensors
        shares, w_EOI = shares_of(ctx.scalings, tensors), opened(w, ctx.storage)
        dx, dw, factors = looped_gradient(ctx.groups, grads[0], x_SI, w_EOI, shares, ctx.needs_input_grad[3:5])
        return None, None, None, dx, dw, *flattened(factors)


def product_dtype(x_SI: torch.Tensor, num_experts: int) -> torch.dtype:
    """The dtype of all experts' products on these rows. It depends on the mean number of rows per expert, so it is the
    same at every step of a given batch size, and the allocator can reuse memory."""
    return torch.float32 if widens(x_SI, len(x_SI) // num_experts) else x_SI.dtype


def fills_up(x_ND: torch.Tensor, experts_NK: torch.Tensor, num_experts: int) -> int:
    """The block size, in rows and a power of 2, to whose multiples groups are padded; 0 for no padding. Only products
    that run in low precision on a CPU are padded (`filled_up` says why)."""
    rows = experts_NK.numel() // num_experts
    low = x_ND.device.type == "cpu" and compute_dtype(x_ND).itemsize < 4
    if not low or torch.compiler.is_compiling() or widens(x_ND, rows):
        return 0
    return min(FILL, 1 << max(0, rows.bit_length() - 1))


class Groups:
    """How S rows, sorted by expert, are divided among E experts; sizes_E [E] are the group sizes.

    On the CPU the sizes are Python numbers. On a GPU they stay on the device, so that the host never waits; in compiled
    code they stay tensors, so that there is one graph. block: all sizes are multiples of it. rows: S, if rows that
    belong to no expert follow.
    """

    def __init__(self, sizes_E: torch.Tensor, block: int = 0, rows: int | None = None):
        self.looped = sizes_E.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.looped:
            self.counts: list[int] = sizes_E.tolist()
            self.filled = sum(self.counts)
            self.pieces = low_rank.pieces(self.counts, block, rows or self.filled)
        else:
            self.ends = sizes_E.cumsum(0).to(torch.int32)

    def linear(self, x_SI: torch.Tensor, w_EOI: Weight, adapters: Sequence[ActiveAdapter] = ()) -> torch.Tensor:
        """[S, O]: each row times its expert's matrix, plus the adapters' shares, in the dtype of autocast or of x."""
        dtype = compute_dtype(x_SI)
        x_SI = x_SI.to(dtype)
        shares = [Share(adapter.scaling, adapter.factors(len(w_EOI), x_SI)) for adapter in adapters]
        if not self.looped:
            return ragged_product(self.ends, x_SI, w_EOI, shares)
        scalings, factors = [share.scaling for share in shares], (share.factors for share in shares)
        w, storage = held(w_EOI)
        with torch.autocast("cpu", enabled=False):
            return _LoopedLinear.apply(self, storage, scalings, x_SI, w, *flattened(factors))

    def product(self, x_SI: torch.Tensor, w_EOI: Weight, shares: Sequence[Share]) -> torch.Tensor:
        """Like `linear`, without autograd; x is already in the dtype of the product."""
        if self.looped:
            return looped_product(self, x_SI, w_EOI, shares)
        return ragged_product(self.ends, x_SI, w_EOI, shares)

    def gradient(
        self,
        g_SO: torch.Tensor,
        x_SI: torch.Tensor,
        w_EOI: Weight,
        shares: Sequence[Share],
        needs: tuple[bool, bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, list[Factors]]:
        """The gradients of `product` with respect to x and w (None unless `needs` asks for them) and to the factors of
        the shares."""
        if self.looped:
            return looped_gradient(self, g_SO, x_SI, w_EOI, shares, needs)
        return ragged_gradient(self.ends, g_SO, x_SI, w_EOI, shares, needs)


@dataclass(frozen=True)
class Slots:
    """The positions of N*K token-expert slots among P rows sorted by expert. Padding rows belong to no slot: they are
    computed from an arbitrary token, and their result is not used.

    slot_P: the slot of each row, -1 for padding. place_S: the row of each slot.
    """

    slot_P: torch.Tensor
    place_S: torch.Tensor
    top_k: int

    @property
    def token_P(self) -> torch.Tensor:
        return self.slot_P.clamp(min=0) // self.top_k

    @property
    def places_NK(self) -> torch.Tensor:
        return self.place_S.unflatten(0, (-1, self.top_k))

    def weights_P(self, weights_NK: torch.Tensor) -> torch.Tensor:
        """The gate weight of each row's slot, 0 for padding rows."""
        return weights_NK.reshape(-1).index_select(0, self.slot_P.clamp(min=0)) * (self.slot_P >= 0)


def filled_up(size: int) -> int:
    """A group's size rounded up to a power of 2, or to a multiple of FILL above FILL. oneDNN creates a primitive for
    each new shape of a low-precision product (about 1 ms), so there should be few shapes."""
    if size > FILL:
        return -(-size // FILL) * FILL
    return 1 << (size - 1).bit_length() if size else 0


def place_slots(experts_NK: torch.Tensor, num_experts: int, block: int) -> tuple[Slots, Groups]:
    """Sort the slots by expert. block: the block size of `fills_up`, 0 for unpadded groups."""
    flat = experts_NK.reshape(-1)
    order_S = flat.argsort(stable=True)
    rows_S = torch.arange(order_S.shape[0], device=flat.device)
    sizes_E = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    sizes_E.index_add_(0, flat, torch.ones_like(flat))
    slot_P, rows = order_S, None
    if block:
        full_E = torch.tensor([filled_up(max(size, block)) if size else 0 for size in sizes_E.tolist()])
        gaps_E = (full_E - sizes_E).cumsum(0) - (full_E - sizes_E)
        rows_S = rows_S + gaps_E[flat[order_S]]
        rows = block * low_rank.whole_pieces(int(full_E.sum()) // block)
        slot_P = order_S.new_full((rows,), -1)
        slot_P[rows_S] = order_S
        sizes_E = full_E
    place_S = torch.empty_like(order_S)
    place_S[order_S] = rows_S
    return Slots(slot_P, place_S, experts_NK.shape[1]), Groups(sizes_E, block, rows)


@fused
def summed_slots(rows_PD: torch.Tensor, places_NK: torch.Tensor) -> torch.Tensor:
    """[N, D]: the sum of each token's rows, in their dtype."""
    if rows_PD.device.type == "cpu" and not torch.compiler.is_compiling():
        return F.embedding_bag(places_NK, rows_PD, mode="sum")
    return rows_PD.index_select(0, places_NK.flatten()).unflatten(0, places_NK.shape).sum(1)


def weighted_slots(y_PD: torch.Tensor, places_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """[N, D] float32: the weighted sum of each token's rows."""
    if y_PD.device.type == "cpu":
        return _bags(y_PD, places_NK, weights_NK)
    return weighted_sum(y_PD, places_NK, weights_NK)


def _bags(y_PD: torch.Tensor, places_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Weighted sums in float32. Many bf16 rows are not copied to float32 first: torch accumulates their sums in float32
    too. But it takes bf16 weights alone, so that each is split in two, and rounds the result once, to bf16."""
    if y_PD.dtype != torch.bfloat16 or y_PD.numel() < MANY:
        return F.embedding_bag(places_NK, y_PD.float(), per_sample_weights=weights_NK, mode="sum")
    coarse = weights_NK.bfloat16()
    fine = (weights_NK - coarse).bfloat16()
    sums = (F.embedding_bag(places_NK, y_PD, per_sample_weights=w, mode="sum").float() for w in (coarse, fine))
    return torch.add(*sums)


@fused
def weighted_sum(y_PD: torch.Tensor, places_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """`weighted_slots` in plain tensor operations."""
    rows_NKD = y_PD.index_select(0, places_NK.flatten()).unflatten(0, places_NK.shape)
    return (rows_NKD.float() * weights_NK.unsqueeze(-1)).sum(1)


@fused
def weighted_slots_gradient(
    g_ND: torch.Tensor, y_PD: torch.Tensor, token_P: torch.Tensor, weights_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `weighted_slots` with respect to y [P, D] and to the rows' weights [P]."""
    g_PD = g_ND.index_select(0, token_P)
    return (g_PD * weights_P.unsqueeze(1)).to(y_PD.dtype), (g_PD * y_PD.float()).sum(-1)


class _Dispatch(torch.autograd.Function):
    """Copies the tokens x [N, D] to the rows of their slots [P, D]. The backward pass gathers instead of scattering, so
    it is deterministic."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, slots: Slots) -> torch.Tensor:
        ctx.slots = slots
        return x_ND.index_select(0, slots.token_P)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return summed_slots(grads[0], ctx.slots.places_NK), None


class _Combine(torch.autograd.Function):
    """Weighted sum over each token's slots, accumulated in float32."""

    @staticmethod
    def forward(ctx: Any, y_PD: torch.Tensor, weights_NK: torch.Tensor, slots: Slots) -> torch.Tensor:
        ctx.save_for_backward(y_PD, weights_NK)
        ctx.slots = slots
        return weighted_slots(y_PD, slots.places_NK, weights_NK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        y_PD, weights_NK = ctx.saved_tensors
        slots: Slots = ctx.slots
        dy, dw_P = weighted_slots_gradient(grads[0], y_PD, slots.token_P, slots.weights_P(weights_NK))
        return dy, dw_P.index_select(0, slots.place_S).view(weights_NK.shape), None


def dispatch(x_ND: torch.Tensor, experts_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, Groups, Slots]:
    """Each slot's token, sorted by expert: (x [P, D], the groups of its rows, the positions of the slots)."""
    slots, groups = place_slots(experts_NK, num_experts, fills_up(x_ND, experts_NK, num_experts))
    return _Dispatch.apply(x_ND, slots), groups, slots


def combine(y_PD: torch.Tensor, weights_NK: torch.Tensor, slots: Slots) -> torch.Tensor:
    """The weighted sum over each token's experts, accumulated in float32 as in the official model: [N, D] float32."""
    return _Combine.apply(y_PD, weights_NK, slots)
