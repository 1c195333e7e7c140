"""Grouped matrix products: rows sorted by expert, each block of rows times its expert's matrix.

S token-expert slots, E experts, I inputs, O outputs. On CUDA one ragged kernel; on the CPU one product an
expert that has rows, into a shared output. Neither builds anything of the size of all experts' weights unless
those weights train.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels import compiled_products as compiled
from .float32_products import compute_dtype, widens

FILL = 32  # rows
ROW_BYTES = 16  # grouped_mm wants rows of a multiple of this


@dataclass
class ActiveAdapter:
    """One active adapter of one weight: scaling * (dropout(x) a^T) b^T. a [r, I] and b [O, r], or a [E, r, I] and
    b [E, O, r] for experts.

    experts: those that a and b hold, where it is not all; the others have no adapter.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: nn.Module
    experts: tuple[int, ...] | None = None

    def places(self, count: int) -> Sequence[int]:
        """Where in a and b each of `count` experts is; -1 for one without."""
        if self.experts is None:
            return range(count)
        places = dict(zip(self.experts, range(count), strict=False))
        return [places.get(expert, -1) for expert in range(count)]

    def dropped(self, x: torch.Tensor) -> torch.Tensor | None:
        """The adapter's own input; None where that is x as it is."""
        return None if isinstance(self.dropout, nn.Identity) else self.dropout(x)

    def spread(self, factor: torch.Tensor, count: int) -> torch.Tensor:
        """a or b for all of `count` experts, zeros for those without."""
        if self.experts is None:
            return factor
        chosen = torch.tensor(self.experts, dtype=torch.long, device=factor.device)
        return factor.new_zeros(count, *factor.shape[1:]).index_copy(0, chosen, factor)


def blocks(counts: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
            start += count


class Factors(NamedTuple):
    """The tensors of an adapter beside a product: a [E, r, I] and b [E, O, r], and z [S, I], its input, None where that
    is the product's own. Or their gradients."""

    z: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor


class Share(NamedTuple):
    """An adapter beside a product: scaling * (z a^T) b^T on the rows of each expert that has a place in a and b (not
    -1)."""

    scaling: float
    places: Sequence[int]
    factors: Factors


def flattened(factors: Iterable[Factors]) -> Iterator[torch.Tensor | None]:
    """The tensors of one adapter after the other: what an autograd function takes and gives."""
    return chain.from_iterable(factors)


def shares_of(kinds: Sequence[tuple[float, Sequence[int]]], tensors: Sequence[torch.Tensor | None]) -> list[Share]:
    """The shares of adapters, from (scaling, places) of each and their `flattened` tensors."""
    given: list[Any] = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    factors = zip(*[iter(given)] * len(Factors._fields), strict=True)
    return [Share(*kind, Factors(*laid)) for kind, laid in zip(kinds, factors, strict=True)]


def looped_product(
    counts: tuple[int, ...], x_SI: torch.Tensor, w_EOI: torch.Tensor, shares: Sequence[Share]
) -> torch.Tensor:
    """y[rows of e] = x[rows of e] @ w[e]^T and the adapters' shares (CPU): [S, O]. An expert's products are in float32
    where that is faster (float32_products.py)."""
    y_SO, dtype = x_SI.new_empty(x_SI.shape[0], w_EOI.shape[1]), product_dtype(x_SI, len(counts))
    for expert, rows in blocks(counts):
        target = y_SO[rows]
        x = x_SI[rows].to(dtype)
        y = torch.mm(x, w_EOI[expert].to(dtype).t(), out=target if dtype == y_SO.dtype else None)
        for scaling, places, (z, a, b) in shares:
            if (place := places[expert]) >= 0:
                low = torch.mm(x if z is None else z[rows].to(dtype), a[place].to(dtype).t())
                y.addmm_(low, b[place].to(dtype).t(), alpha=scaling)
        if y is not target:
            target.copy_(y)
    return y_SO


def looped_gradient(
    counts: tuple[int, ...],
    g_SO: torch.Tensor,
    x_SI: torch.Tensor,
    w_EOI: torch.Tensor,
    shares: Sequence[Share],
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[Factors]]:
    """The gradients of x, w (each where `needs` says so) and the factors of the shares of `looped_product`."""
    dx_SI = torch.empty_like(x_SI) if needs[0] else None
    dw_EOI = torch.zeros_like(w_EOI) if needs[1] else None
    gradients: list[Factors] = []
    for share in shares:
        z, a, b = share.factors
        dz = None if z is None else torch.zeros_like(z)
        gradients.append(Factors(dz, torch.zeros_like(a), torch.zeros_like(b)))
    dtype = product_dtype(x_SI, len(counts))
    for expert, rows in blocks(counts):
        g, x = g_SO[rows].to(dtype), x_SI[rows].to(dtype)
        dx = None if dx_SI is None else torch.mm(g, w_EOI[expert].to(dtype))
        if dw_EOI is not None:
            dw_EOI[expert] = torch.mm(g.t(), x)
        for (scaling, places, (z, a, b)), (dz, da, db) in zip(shares, gradients, strict=True):
            if (place := places[expert]) < 0:
                continue
            own, a_e = x if z is None else z[rows].to(dtype), a[place].to(dtype)
            g_low = torch.mm(g, b[place].to(dtype)).mul_(scaling)
            da[place] = torch.mm(g_low.t(), own)
            db[place] = torch.mm(g.t(), torch.mm(own, a_e.t())).mul_(scaling)
            if dz is not None:
                dz[rows] = torch.mm(g_low, a_e)
            elif dx is not None:
                dx.addmm_(g_low, a_e)
        if dx_SI is not None and dx is not None:
            dx_SI[rows] = dx
    return dx_SI, dw_EOI, gradients


class _LoopedLinear(torch.autograd.Function):
    """`looped_product`; kinds: (scaling, places) of each adapter, tensors: their `flattened` factors."""

    @staticmethod
    def forward(
        ctx: Any,
        counts: tuple[int, ...],
        kinds: tuple[tuple[float, Sequence[int]], ...],
        x_SI: torch.Tensor,
        w_EOI: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_SI, w_EOI, *tensors)
        ctx.counts, ctx.kinds = counts, kinds
        return looped_product(counts, x_SI, w_EOI, shares_of(kinds, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_SI, w_EOI, *tensors = ctx.saved_tensors
        shares = shares_of(ctx.kinds, tensors)
        dx, dw, factors = looped_gradient(ctx.counts, grads[0], x_SI, w_EOI, shares, ctx.needs_input_grad[2:4])
        return None, None, dx, dw, *flattened(factors)


def product_dtype(x_SI: torch.Tensor, num_experts: int) -> torch.dtype:
    """Of all experts' products on these rows. By the mean of their rows: what is not filled up is as long at each step,
    and memory of one length is found again."""
    return torch.float32 if widens(x_SI, len(x_SI) // num_experts) else x_SI.dtype


def fills_up(x_ND: torch.Tensor, experts_NK: torch.Tensor, num_experts: int) -> bool:
    """Whether groups are filled up: where low-precision products on a CPU run as such."""
    low = x_ND.device.type == "cpu" and compute_dtype(x_ND).itemsize < 4
    return low and not torch.compiler.is_compiling() and not widens(x_ND, experts_NK.numel() // num_experts)


class Groups:
    """How S rows, sorted by expert, fall to E experts; sizes_E [E].

    On the CPU the sizes are Python numbers; on a GPU they stay there, so that the host never waits, and in compiled
    code, so that it is one graph.
    """

    def __init__(self, sizes_E: torch.Tensor):
        looped = sizes_E.device.type == "cpu" and not torch.compiler.is_compiling()
        self.counts: tuple[int, ...] = tuple(sizes_E.tolist()) if looped else ()
        if not looped:
            self.ends = sizes_E.cumsum(0).to(torch.int32)

    def linear(self, x_SI: torch.Tensor, w_EOI: torch.Tensor, adapters: Sequence[ActiveAdapter] = ()) -> torch.Tensor:
        """[S, O]: each row times its expert's matrix, and beside it the adapters' share, in the dtype of autocast or
        of x."""
        dtype = compute_dtype(x_SI)
        x_SI = x_SI.to(dtype)
        if self.counts:
            kinds = tuple((adapter.scaling, adapter.places(len(w_EOI))) for adapter in adapters)
            factors = [Factors(adapter.dropped(x_SI), adapter.a, adapter.b) for adapter in adapters]
            with torch.autocast("cpu", enabled=False):
                return _LoopedLinear.apply(self.counts, kinds, x_SI, w_EOI, *flattened(factors))
        product = compiled.grouped_mm if x_SI.device.type == "cpu" and torch.compiler.is_compiling() else F.grouped_mm
        y_SO = product(x_SI, w_EOI.to(dtype).transpose(-2, -1), offs=self.ends)
        for adapter in adapters:
            a, b = (adapter.spread(f.to(dtype), len(w_EOI)) for f in (adapter.a, adapter.b))
            more = -a.shape[1] % (ROW_BYTES // dtype.itemsize)  # zeros, up to a rank that the kernel takes
            a, b = F.pad(a, (0, 0, 0, more)).transpose(-2, -1), F.pad(b, (0, more)).contiguous().transpose(-2, -1)
            low = product(adapter.dropout(x_SI), a, offs=self.ends)
            y_SO = torch.add(y_SO, product(low, b, offs=self.ends), alpha=adapter.scaling)
        return y_SO


@dataclass(frozen=True)
class Slots:
    """Where N*K token-expert slots lie among P rows that are sorted by expert. Rows that fill a group up belong to no
    slot: they compute from some token and go nowhere.

    slot_P: the slot of each row, -1 where it fills up. place_S: the row of each slot.
    """

    slot_P: torch.Tensor
    place_S: torch.Tensor
    top_k: int

    @property
    def token_P(self) -> torch.Tensor:
        return self.slot_P.clamp(min=0) // self.top_k


def filled_up(size: int) -> int:
    """A group's size rounded up to a power of 2, above FILL to its multiples: oneDNN makes a primitive for each new
    shape of a low-precision product (about 1 ms), so a few shapes have to do."""
    if size > FILL:
        return -(-size // FILL) * FILL
    return 1 << (size - 1).bit_length() if size else 0


def place_slots(experts_NK: torch.Tensor, num_experts: int, fill_up: bool) -> tuple[Slots, Groups]:
    """Sorts the slots by expert. fill_up: see `filled_up`; not on a GPU, whose kernels take ragged groups."""
    flat = experts_NK.reshape(-1)
    order_S = flat.argsort(stable=True)
    rows_S = torch.arange(order_S.shape[0], device=flat.device)
    sizes_E = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    sizes_E.index_add_(0, flat, torch.ones_like(flat))
    slot_P = order_S
    if fill_up:
        full_E = torch.tensor([filled_up(size) for size in sizes_E.tolist()])
        gaps_E = (full_E - sizes_E).cumsum(0) - (full_E - sizes_E)
        rows_S = rows_S + gaps_E[flat[order_S]]
        slot_P = order_S.new_full((int(full_E.sum()),), -1)
        slot_P[rows_S] = order_S
        sizes_E = full_E
    place_S = torch.empty_like(order_S)
    place_S[order_S] = rows_S
    return Slots(slot_P, place_S, experts_NK.shape[1]), Groups(sizes_E)


class _Dispatch(torch.autograd.Function):
    """Rows of x [N, D] copied to their slots' rows [P, D]; the gradient gathers, so it is the same at every run."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, slots: Slots) -> torch.Tensor:
        ctx.slots = slots
        return x_ND.index_select(0, slots.token_P)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        slots: Slots = ctx.slots
        return grads[0].index_select(0, slots.place_S).unflatten(0, (-1, slots.top_k)).sum(1), None


class _Combine(torch.autograd.Function):
    """Weighted sum over each token's slots, accumulated in float32; on a GPU without a float32 tensor of all slots."""

    @staticmethod
    def forward(ctx: Any, y_PD: torch.Tensor, weights_NK: torch.Tensor, slots: Slots) -> torch.Tensor:
        ctx.save_for_backward(y_PD, weights_NK)
        ctx.slots = slots
        places_NK = slots.place_S.view(weights_NK.shape)
        if y_PD.device.type == "cpu":
            return F.embedding_bag(places_NK, y_PD.float(), per_sample_weights=weights_NK, mode="sum")
        out = torch.zeros(weights_NK.shape[0], y_PD.shape[1], dtype=torch.float32, device=y_PD.device)
        for k in range(weights_NK.shape[1]):
            out.addcmul_(y_PD.index_select(0, places_NK[:, k]).float(), weights_NK[:, k : k + 1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        y_PD, weights_NK = ctx.saved_tensors
        slots: Slots = ctx.slots
        need_y, need_w = ctx.needs_input_grad[:2]
        g_PD = grads[0].index_select(0, slots.token_P)
        dw = None
        if need_w:
            dw_P = torch.einsum("pd,pd->p", g_PD, y_PD.float())
            dw = dw_P.index_select(0, slots.place_S).view(weights_NK.shape)
        weights_P = weights_NK.reshape(-1).index_select(0, slots.slot_P.clamp(min=0)) * (slots.slot_P >= 0)
        dy = g_PD.mul_(weights_P.unsqueeze(1)).to(y_PD.dtype) if need_y else None
        return dy, dw, None


def dispatch(x_ND: torch.Tensor, experts_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, Groups, Slots]:
    """Each slot's token, sorted by expert: (x [P, D], the groups of its rows, where the slots are)."""
    slots, groups = place_slots(experts_NK, num_experts, fills_up(x_ND, experts_NK, num_experts))
    return _Dispatch.apply(x_ND, slots), groups, slots


def combine(y_PD: torch.Tensor, weights_NK: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Sum over each token's experts, weighted, in float32 as the official model does: [N, D] float32."""
    return _Combine.apply(y_PD, weights_NK, slots)
