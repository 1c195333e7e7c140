"""Grouped matrix products: rows sorted by expert, each block of rows times its expert's matrix.

S token-expert slots, E experts, I inputs, O outputs. On CUDA one ragged kernel; on the CPU one product an
expert that has rows, into a shared output. Neither builds anything of the size of all experts' weights unless
those weights train.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class _LoopedLinear(torch.autograd.Function):
    """y[rows of e] = x[rows of e] @ w[e]^T, a product an expert with rows (CPU)."""

    @staticmethod
    def forward(ctx: Any, x_SI: torch.Tensor, w_EOI: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
        ctx.save_for_backward(x_SI, w_EOI)
        ctx.counts = counts
        y_SO = x_SI.new_empty(x_SI.shape[0], w_EOI.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                torch.mm(x_SI[rows], w_EOI[expert].t(), out=y_SO[rows])
                start += count
        return y_SO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (g_SO,) = grads
        x_SI, w_EOI = ctx.saved_tensors
        g_SO = g_SO.contiguous()
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x_SI) if need_x else None
        dw = torch.zeros_like(w_EOI) if need_w else None
        start = 0
        for expert, count in enumerate(ctx.counts):
            if count:
                rows = slice(start, start + count)
                if dx is not None:
                    torch.mm(g_SO[rows], w_EOI[expert], out=dx[rows])
                if dw is not None:
                    torch.mm(g_SO[rows].t(), x_SI[rows], out=dw[expert])
                start += count
        return dx, dw, None


class Groups:
    """How S rows, sorted by expert, fall to E experts.

    On the CPU the sizes are Python numbers; on a GPU they stay there, so that the host never waits.
    """

    def __init__(self, experts_S: torch.Tensor, num_experts: int):
        sizes = torch.bincount(experts_S, minlength=num_experts) if experts_S.device.type == "cpu" else None
        if sizes is None:
            sizes = torch.zeros(num_experts, dtype=torch.int64, device=experts_S.device)
            sizes.index_add_(0, experts_S, torch.ones_like(experts_S))
            self.ends = sizes.cumsum(0).to(torch.int32)
            self.counts: tuple[int, ...] = ()
        else:
            self.counts = tuple(sizes.tolist())

    def linear(self, x_SI: torch.Tensor, w_EOI: torch.Tensor) -> torch.Tensor:
        """[S, O]: each row times its expert's matrix, in the dtype of autocast or of x."""
        kind = x_SI.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_SI.dtype
        x_SI, w_EOI = x_SI.to(dtype), w_EOI.to(dtype)
        if self.counts:
            return _LoopedLinear.apply(x_SI, w_EOI, self.counts)
        return F.grouped_mm(x_SI, w_EOI.transpose(-2, -1), offs=self.ends)


class _Dispatch(torch.autograd.Function):
    """Rows of x [N, D] copied to their slots [S, D]; the gradient gathers, so it is the same at every run."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, order_S: torch.Tensor, inverse_S: torch.Tensor, top_k: int):
        ctx.save_for_backward(inverse_S)
        ctx.top_k = top_k
        return x_ND.index_select(0, order_S // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (inverse_S,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_S).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """Weighted sum over each token's slots, accumulated in float32 without a [N, K, D] float32 tensor."""

    @staticmethod
    def forward(
        ctx: Any, y_SD: torch.Tensor, weights_NK: torch.Tensor, order_S: torch.Tensor, inverse_S: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(y_SD, weights_NK, order_S)
        slots_NK = inverse_S.view(weights_NK.shape)
        out = torch.zeros(weights_NK.shape[0], y_SD.shape[1], dtype=torch.float32, device=y_SD.device)
        for k in range(weights_NK.shape[1]):
            out.addcmul_(y_SD.index_select(0, slots_NK[:, k]).float(), weights_NK[:, k : k + 1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        y_SD, weights_NK, order_S = ctx.saved_tensors
        need_y, need_w = ctx.needs_input_grad[:2]
        g_SD = grads[0].index_select(0, order_S // weights_NK.shape[1])
        dw = None
        if need_w:
            dw_S = torch.einsum("sd,sd->s", g_SD, y_SD.float())
            dw = torch.empty_like(dw_S).index_copy_(0, order_S, dw_S).view(weights_NK.shape)
        dy = g_SD.mul_(weights_NK.reshape(-1, 1).index_select(0, order_S)).to(y_SD.dtype) if need_y else None
        return dy, dw, None, None


def dispatch(
    x_ND: torch.Tensor, experts_NK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, Groups, torch.Tensor, torch.Tensor]:
    """Sorts token-expert slots by expert: (x [S, D], groups, order [S], inverse [S])."""
    flat = experts_NK.reshape(-1)
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    x_SD = _Dispatch.apply(x_ND, order, inverse, experts_NK.shape[1])
    return x_SD, Groups(flat, num_experts), order, inverse


def combine(
    y_SD: torch.Tensor, weights_NK: torch.Tensor, order_S: torch.Tensor, inverse_S: torch.Tensor
) -> torch.Tensor:
    """Sum over each token's experts, weighted, in float32 as the official model does: [N, D] float32."""
    return _Combine.apply(y_SD, weights_NK, order_S, inverse_S)


def swiglu(gate_up: torch.Tensor, activation: nn.Module) -> torch.Tensor:
    """activation(gate) * up, of the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up
