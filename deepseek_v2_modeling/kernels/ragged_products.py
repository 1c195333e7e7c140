"""Grouped products with adapters on a GPU: one ragged kernel each; the group sizes stay on the device.

S rows sorted by expert, E experts, I inputs, O outputs, r rank; ends [E]: the end of each expert's row range.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from . import compiled_products as compiled
from .low_rank import Factors, Share
from .quantized_weights import Weight

ROW_BYTES = 16  # grouped_mm requires row sizes that are a multiple of this


def grouped_mm(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [S, I] times w [E, I, O] -> [S, O], or x [I, S] times w [S, O] -> [E, I, O]."""
    in_graph = x.device.type == "cpu" and torch.compiler.is_compiling()
    return compiled.grouped_mm(x, w, ends) if in_graph else F.grouped_mm(x, w, offs=ends)


def padded(share: Share, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """a [E, r, I] and b [E, O, r], padded with zeros to a rank that the kernel supports."""
    _, a, b = share.factors
    padding = -a.shape[1] % (ROW_BYTES // dtype.itemsize)
    return F.pad(a.to(dtype), (0, 0, 0, padding)), F.pad(b.to(dtype), (0, padding)).contiguous()


def ragged_product(ends: torch.Tensor, x_SI: torch.Tensor, w_EOI: Weight, shares: Sequence[Share]) -> torch.Tensor:
    """y[rows of e] = x[rows of e] @ w[e]^T plus the adapters' shares: [S, O]."""
    y_SO = grouped_mm(x_SI, w_EOI.to(x_SI.dtype).transpose(1, 2), ends)
    for share in shares:
        a, b = padded(share, x_SI.dtype)
        z = share.factors.z
        low = grouped_mm(x_SI if z is None else z, a.transpose(1, 2), ends)
        y_SO = torch.add(y_SO, grouped_mm(low, b.transpose(1, 2), ends), alpha=share.scaling)
    return y_SO


def ragged_gradient(
    ends: torch.Tensor,
    g_SO: torch.Tensor,
    x_SI: torch.Tensor,
    w_EOI: Weight,
    shares: Sequence[Share],
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[Factors]]:
    """The gradients of `ragged_product` with respect to x and w (None unless `needs` asks for them) and to the factors
    of the shares, whose input is x itself."""
    dx_SI = grouped_mm(g_SO, w_EOI.to(g_SO.dtype), ends) if needs[0] else None
    dw_EOI = grouped_mm(g_SO.t(), x_SI, ends).to(w_EOI.dtype) if needs[1] and isinstance(w_EOI, torch.Tensor) else None
    gradients = []
    for share in shares:
        (a, b), (_, full_a, full_b), rank = padded(share, x_SI.dtype), share.factors, share.factors.a.shape[1]
        g_low = grouped_mm(g_SO, b, ends) * share.scaling
        low = grouped_mm(x_SI, a.transpose(1, 2), ends) * share.scaling
        da = grouped_mm(g_low.t(), x_SI, ends)[:, :rank].to(full_a.dtype)
        db = grouped_mm(g_SO.t(), low, ends)[..., :rank].to(full_b.dtype)
        gradients.append(Factors(None, da, db))
        if dx_SI is not None:
            dx_SI += grouped_mm(g_low, a, ends)
    return dx_SI, dw_EOI, gradients
