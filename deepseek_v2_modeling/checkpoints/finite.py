"""Detects non-finite numbers while files are read: a model with a single NaN weight gives no usable output."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .hub_layout import pieces_of

CHECKED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite, at memory bandwidth (`isfinite` takes 20 times as long).

    A finite sum implies finite summands. If the sum is not finite, or is likely to overflow, the minimum and maximum
    decide.
    """
    if tensor.dtype not in CHECKED or tensor.is_meta or not tensor.numel():
        return True
    if tensor.dtype != torch.float16 and bool(tensor.sum().isfinite()):
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def check_finite(name: str, tensor: torch.Tensor, where: str | Path) -> torch.Tensor:
    """Return the tensor; raise ModelError if its numbers are not all finite. where: its file or model, for the
    message."""
    if not is_finite(tensor):
        raise ModelError(f"{where}: {name} contains NaN or infinite values")
    return tensor


def check_weights(model: nn.Module, where: Any) -> None:
    """Raise ModelError for the first weight of a model, loaded from `where`, that is not finite; weights of experts are
    named as on disk."""
    for name, parameter in chain(model.named_parameters(), model.named_buffers()):
        if is_finite(parameter.detach()):
            continue
        for part, piece in pieces_of(name, tuple(parameter.shape)).items():
            kind = str(parameter.dtype).removeprefix("torch.")
            check_finite(f"{part} ({kind})", parameter.detach()[piece.place or ...], where)
