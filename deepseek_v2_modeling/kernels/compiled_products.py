"""Grouped matrix products for torch.compile on a CPU, as custom ops that the compiler does not trace into.

There `F.grouped_mm` compiles for bf16 only, and reading the group sizes in Python would break the graph; as custom ops
they keep a forward in one graph.
"""

from collections.abc import Iterator
from typing import Any

import torch


def _blocks(ends_E: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, slice of its rows) for every expert that has rows."""
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


@torch.library.custom_op("deepseek_v2::grouped_mm", mutates_args=())
def grouped_mm(x_SI: torch.Tensor, w_EIO: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """[S, O]: each row times its expert's matrix; offs [E] are the ends of the experts' row ranges."""
    y_SO = x_SI.new_empty(x_SI.shape[0], w_EIO.shape[2])
    for expert, rows in _blocks(offs):
        torch.mm(x_SI[rows], w_EIO[expert], out=y_SO[rows])
    return y_SO


@torch.library.custom_op("deepseek_v2::grouped_outer", mutates_args=())
def grouped_outer(x_SI: torch.Tensor, g_SO: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """[E, I, O]: x^T g, summed over each expert's rows."""
    out_EIO = x_SI.new_zeros(offs.shape[0], x_SI.shape[1], g_SO.shape[1])
    for expert, rows in _blocks(offs):
        torch.mm(x_SI[rows].t(), g_SO[rows], out=out_EIO[expert])
    return out_EIO


@grouped_mm.register_fake
def _(x_SI: torch.Tensor, w_EIO: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return x_SI.new_empty(x_SI.shape[0], w_EIO.shape[2])


@grouped_outer.register_fake
def _(x_SI: torch.Tensor, g_SO: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return x_SI.new_empty(offs.shape[0], x_SI.shape[1], g_SO.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g_SO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_SI, w_EIO, offs = ctx.saved_tensors
    dx = grouped_mm(g_SO, w_EIO.transpose(1, 2), offs) if ctx.needs_input_grad[0] else None
    return dx, grouped_outer(x_SI, g_SO, offs) if ctx.needs_input_grad[1] else None, None


grouped_mm.register_autograd(_backward, setup_context=_save_inputs)
