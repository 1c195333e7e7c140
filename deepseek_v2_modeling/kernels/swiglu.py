"""The gated activation of SwiGLU feed-forward blocks."""

from typing import Any

import torch
from torch import nn

from .fused import fused


class _Gated(torch.autograd.Function):
    """activation(gate) * up, saving only gate and up: the backward pass recomputes the activation."""

    @staticmethod
    def forward(ctx: Any, activation: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        (d_gate,) = torch.autograd.grad(activated, leaf, grads[0] * up)
        return None, d_gate, grads[0] * activated.detach()


@fused
def gated(gate: torch.Tensor, up: torch.Tensor, activation: nn.Module) -> torch.Tensor:
    """activation(gate) * up."""
    if torch.compiler.is_compiling():  # the compiler decides itself what to save and what to recompute
        return activation(gate) * up
    return _Gated.apply(activation, gate, up)
