"""Root-mean-square normalisation."""

import torch
from torch import nn


class DeepseekV2RMSNorm(nn.Module):
    """weight * x / rms(x); the mean is taken in float32, the dtype of x comes back (official behaviour)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)
