"""The adapters' shares of grouped products on a CPU: scaling * (z a^T) b^T, with a and b of each row's expert.

Low-rank products are tiny, and a call per expert costs more than its arithmetic. So rows are processed in pieces of
PIECE blocks, where a block is a fixed number of rows of one expert: one batched product per piece, with a and b
gathered by the expert of each block. The gradients of the blocks are summed by expert. All pieces of a batch have the
same shape.

S rows sorted by expert, E experts, I inputs, O outputs, r rank, Q blocks.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

PIECE = 32  # blocks


class Factors(NamedTuple):
    """The tensors of an adapter, or their gradients: a [E, r, I], b [E, O, r] and its input z [S, I], None if that is
    the product's own input."""

    z: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor


class Share(NamedTuple):
    """The low-rank term that an adapter adds to a product: scaling * (z a^T) b^T."""

    scaling: float
    factors: Factors

    def for_pieces(self, pieces: Sequence["Piece"], dtype: torch.dtype) -> Factors:
        """The factors, with a and b of all experts cast to `dtype` if the pieces have more blocks than there are
        experts; otherwise, as in a decode step, each piece casts only those it needs."""
        z, a, b = self.factors
        many = sum(len(piece.expert_Q) for piece in pieces) > len(a)
        return Factors(z, a.to(dtype), b.to(dtype)) if many else self.factors


def flattened(factors: Iterable[Factors]) -> Iterator[torch.Tensor | None]:
    """The tensors of all adapters in one flat sequence, as autograd functions take and return them."""
    return chain.from_iterable(factors)


def _laid_out(factor: torch.Tensor) -> torch.Tensor:
    """Contiguous. PEFT's B, whose experts lie side by side, as a transposed matrix: torch copies that in blocks, four
    times as fast."""
    last = factor.movedim(0, -1)
    if factor.ndim != 3 or factor.is_contiguous() or not last.is_contiguous():
        return factor.contiguous()
    return last.flatten(0, 1).t().contiguous().view(factor.shape)


def shares_of(scalings: Sequence[float], tensors: Sequence[torch.Tensor | None]) -> list[Share]:
    """The shares of adapters, from the scaling of each and their `flattened` tensors."""
    contiguous: list[Any] = [None if tensor is None else _laid_out(tensor) for tensor in tensors]
    factors = zip(*[iter(contiguous)] * len(Factors._fields), strict=True)
    return [Share(scaling, Factors(*three)) for scaling, three in zip(scalings, factors, strict=True)]


class Piece(NamedTuple):
    """A range of rows, divided into blocks of equal size, and the expert of each block."""

    rows: slice
    expert_Q: torch.Tensor

    def of(self, x_SI: torch.Tensor) -> torch.Tensor:
        """The rows of x in this piece: [Q, rows of a block, I]."""
        return x_SI[self.rows].unflatten(0, (len(self.expert_Q), -1))


def whole_pieces(count: int) -> int:
    """A number of blocks rounded up to a power of 2, or to a multiple of PIECE above PIECE."""
    return -(-count // PIECE) * PIECE if count > PIECE else 1 << max(0, count - 1).bit_length()


def pieces(counts: Sequence[int], block: int, rows: int) -> list[Piece]:
    """The pieces of S rows. counts: rows of each expert, multiples of block. block: rows of a block; 0 makes one block,
    and one piece, of all rows of an expert. rows: S."""
    experts = torch.arange(len(counts))
    if not block:
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        spans = zip(ends, ends[1:], experts.split(1), strict=False)
        return [Piece(slice(start, end), expert) for start, end, expert in spans if end > start]
    expert_Q = experts.repeat_interleave(torch.tensor(counts) // block)
    expert_Q = torch.cat((expert_Q, expert_Q.new_zeros(rows // block - len(expert_Q))))
    starts = range(0, rows, PIECE * block)
    return [Piece(slice(s, s + len(part) * block), part) for s, part in zip(starts, expert_Q.split(PIECE), strict=True)]


def add_share(
    pieces: Sequence[Piece], share: Share, x_SI: torch.Tensor, y_SO: torch.Tensor, dtype: torch.dtype
) -> None:
    """Add to y, in place, an adapter's share of a product on x; computes in `dtype`."""
    z, a, b = share.for_pieces(pieces, dtype)
    for piece in pieces:
        x, y, experts = piece.of(x_SI if z is None else z).to(dtype), piece.of(y_SO), piece.expert_Q
        low = torch.bmm(x, a[experts].to(dtype).transpose(1, 2))
        _add_product(y, low, b[experts].to(dtype).transpose(1, 2), share.scaling)


def share_gradient(
    pieces: Sequence[Piece],
    share: Share,
    x_SI: torch.Tensor,
    g_SO: torch.Tensor,
    dx_SI: torch.Tensor | None,
    dtype: torch.dtype,
) -> Factors:
    """The gradients of the share's factors; that of x is added to dx in place unless dx is None. Computes in
    `dtype`."""
    z, a, b = share.for_pieces(pieces, dtype)
    dz = None if z is None else torch.zeros_like(z)
    gradients = Factors(dz, torch.zeros_like(share.factors.a), torch.zeros_like(share.factors.b))
    into = dx_SI if z is None else dz
    for piece in pieces:
        experts, x, g = piece.expert_Q, piece.of(x_SI if z is None else z).to(dtype), piece.of(g_SO).to(dtype)
        a_Q = a[experts].to(dtype)
        g_low = torch.bmm(g, b[experts].to(dtype)).mul_(share.scaling)
        low = torch.bmm(x, a_Q.transpose(1, 2)).mul_(share.scaling)
        gradients.a.index_add_(0, experts, torch.bmm(g_low.transpose(1, 2), x).to(gradients.a.dtype))
        gradients.b.index_add_(0, experts, torch.bmm(g.transpose(1, 2), low).to(gradients.b.dtype))
        if into is not None:
            _add_product(piece.of(into), g_low, a_Q, 1.0)
    return gradients


def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """into += scaling * left @ right, computed in the dtype of the factors, which may be wider than into's."""
    if into.dtype == left.dtype:
        into.baddbmm_(left, right, alpha=scaling)
    else:
        into.add_(torch.bmm(left, right), alpha=scaling)
