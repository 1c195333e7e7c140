"""Root-mean-square normalisation."""

from typing import Any

import torch
from torch import nn

from ..kernels.fused import MANY, fused


class _Normed(torch.autograd.Function):
    """x / rms(x) in the dtype of x; saves x itself for the backward pass instead of float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale)
        normed = wide * scale
        # In code compiled by torch 2.11, the result of a `to` that changes nothing has no gradient.
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, scale = ctx.saved_tensors
        g, normed = grads[0].float(), x.float() * scale
        return ((g - normed * (g * normed).mean(-1, keepdim=True)) * scale).to(x.dtype), None


@fused
def weighted_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * _Normed.apply(x, eps)


class DeepseekV2RMSNorm(nn.RMSNorm):
    """weight * x / rms(x), with the mean computed in float32 and the result in the dtype of x (official behaviour)."""

    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.numel() >= MANY:
            return weighted_norm(x, self.weight, self.eps)
        # torch's own has no gradient that saves memory, but is one call for few values. It gets no weight, by which it
        # would multiply before the result is rounded to the dtype of x.
        return self.weight * torch.rms_norm(x, x.shape[-1:], None, self.eps)
