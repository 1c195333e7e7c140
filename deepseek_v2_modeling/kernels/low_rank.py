"""The adapters' shares of grouped products on a CPU: scaling * (z a^T) b^T, a and b by the expert of each row.

Low-rank products are tiny, and a call for each expert costs more than its arithmetic. So rows are taken in pieces of
PIECE blocks, a block being some rows of one expert: one batched product of a piece, with a and b of each block's expert
beside it. Gradients of the blocks are summed up by expert. All pieces have one shape.

S rows sorted by expert, E experts, I inputs, O outputs, r rank, Q blocks.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

PIECE = 32  # blocks


class Factors(NamedTuple):
    """The tensors of an adapter beside a product: a [E, r, I] and b [E, O, r], and z [S, I], its input, None where that
    is the product's own. Or their gradients."""

    z: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor


class Share(NamedTuple):
    """An adapter beside a product."""

    scaling: float
    factors: Factors

    def for_pieces(self, pieces: Sequence["Piece"], dtype: torch.dtype) -> Factors:
        """The factors, a and b of all experts cast at once where the pieces have more blocks than there are experts;
        else, as in a decode step, those of each piece are still to be cast."""
        z, a, b = self.factors
        many = sum(len(piece.expert_Q) for piece in pieces) > len(a)
        return Factors(z, a.to(dtype), b.to(dtype)) if many else self.factors


def flattened(factors: Iterable[Factors]) -> Iterator[torch.Tensor | None]:
    """The tensors of one adapter after the other: what an autograd function takes and gives."""
    return chain.from_iterable(factors)


def shares_of(scalings: Sequence[float], tensors: Sequence[torch.Tensor | None]) -> list[Share]:
    """The shares of adapters, from the scaling of each and their `flattened` tensors."""
    contiguous: list[Any] = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    factors = zip(*[iter(contiguous)] * len(Factors._fields), strict=True)
    return [Share(scaling, Factors(*laid)) for scaling, laid in zip(scalings, factors, strict=True)]


class Piece(NamedTuple):
    """Rows of equal blocks, and each block's expert."""

    rows: slice
    expert_Q: torch.Tensor

    def of(self, x_SI: torch.Tensor) -> torch.Tensor:
        """[Q, rows of a block, I]"""
        return x_SI[self.rows].unflatten(0, (len(self.expert_Q), -1))


def whole_pieces(count: int) -> int:
    """A number of blocks rounded up: to a power of 2 below PIECE, to its multiples above."""
    return -(-count // PIECE) * PIECE if count > PIECE else 1 << max(0, count - 1).bit_length()


def pieces(counts: Sequence[int], block: int, rows: int) -> list[Piece]:
    """The pieces of S rows; counts: those of each expert. block: rows of a block, of which all counts are multiples; 0
    for blocks of all of an expert's rows, each a piece."""
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
    """y += the share of a product on x; products in `dtype`."""
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
    """The gradients of the share's factors; that of x is added to dx, where there is one. Products in `dtype`."""
    z, a, b = share.for_pieces(pieces, dtype)
    of_z = None if z is None else torch.zeros_like(z)
    gradients = Factors(of_z, torch.zeros_like(share.factors.a), torch.zeros_like(share.factors.b))
    into = dx_SI if z is None else of_z
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
    """into += scaling * left @ right, in the dtype of the two, which may be wider."""
    if into.dtype == left.dtype:
        into.baddbmm_(left, right, alpha=scaling)
    else:
        into.add_(torch.bmm(left, right), alpha=scaling)
