"""Reads into each process its own part of the weights, so that the memory of the host holds no model a second time."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..adapters.layouts import hub_name
from ..checkpoints.finite import check_finite
from ..checkpoints.hub_layout import COMPUTED
from ..checkpoints.lazy_tensors import FusedExperts, QuantizedSource
from ..checkpoints.sources import base_directory
from ..checkpoints.strict import say_heads
from ..checkpoints.tensor_files import base_files, open_files
from ..outline import match_weights


def read_base(model: nn.Module, outline: Any, base: str) -> list[str]:
    """Read this process's part of the weights of a model directory or hub name into a model whose weights are sharded.

    outline: the same model on the meta device, without adapters.

    Returns:
        The names of the weights that are not in its files: adapters and new heads.

    Raises:
        ModelError: a file cannot be read, or tensors are missing, unexpected, misshapen or not finite.
    """
    absent, known = [], outline.state_dict().keys()
    with ExitStack() as files:
        sources = match_weights(base, outline, open_files(map(str, base_files(base_directory(base))), files))
        for name, tensor in _saved(model):
            own = hub_name(name).replace(".original_module", "")
            if own in sources:
                check_finite(own, _read(sources[own], tensor), base)
            else:
                absent.append(name)
    left_out = sorted(name for name in sources.keys() - known if not re.search(COMPUTED, name))
    say_heads(base, sorted(known - sources.keys()), left_out, outline.config)
    return absent


def _saved(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the model's state themselves, which `state_dict` may copy."""
    names = model.state_dict().keys()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in names:
            yield name, tensor.detach()


def _read(source: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Fill this process's part of a tensor, which is divided along its first dimension; returns that part."""
    part, first = tensor, 0
    if isinstance(tensor, DTensor):
        part = tensor.to_local()
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        assert tuple(shape[1:]) == tuple(tensor.shape[1:])
        first = offset[0]
    if isinstance(source, FusedExperts) or (isinstance(source, QuantizedSource) and tensor.ndim == 3):
        source.fill(part, first)
    elif isinstance(source, QuantizedSource):  # its codes and scales are not where its rows are
        part.copy_(source.to(part.device)[first : first + len(part)])
    elif part.ndim == 0:
        part.copy_(source[...])
    elif len(part):
        part.copy_(source[first : first + len(part)])
    return part
