"""The hub's layout of a checkpoint: how tensors on disk map to the model's parameters.

On disk each projection of each expert is a separate tensor; in the model the experts of a layer are fused into one
parameter.
"""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration import CORRECTION_BIAS, DeepseekV2Config

# Fused parameter -> the projections of each expert that it holds, stacked along the rows.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# A buffer in some old checkpoints, which is ignored because it is computed from the config.
COMPUTED = r"rotary_emb\.inv_freq$"
EXTRA_LAYERS = "num_nextn_predict_layers"
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """The part of the model that a tensor on disk holds: a whole parameter, or an expert's rows of a fused
    parameter."""

    parameter: str
    shape: Shape
    place: tuple[int, slice] | None = None


def pieces_of(parameter: str, shape: Shape) -> dict[str, Piece]:
    """{name on disk: piece} for one parameter."""
    module, _, last = parameter.rpartition(".")
    if not module.endswith(".experts") or last not in FUSED:
        return {parameter: Piece(parameter, shape)}
    experts, all_rows, columns = shape
    rows = all_rows // len(FUSED[last])
    return {
        f"{module}.{e}.{part}.weight": Piece(parameter, (rows, columns), (e, slice(i * rows, (i + 1) * rows)))
        for e in range(experts)
        for i, part in enumerate(FUSED[last])
    }


def hub_layout(parameters: Mapping[str, Shape], found: Container[str] = ()) -> dict[str, Piece]:
    """{name on disk: piece} for all parameters. found: names on disk; experts that are fused on disk stay fused."""
    layout: dict[str, Piece] = {}
    for name, shape in parameters.items():
        layout |= {name: Piece(name, shape)} if name in found else pieces_of(name, shape)
    return layout


def is_extra_layer(name: str, config: DeepseekV2Config) -> bool:
    """Whether a tensor is of a layer for multi-token prediction, which follow the model's own and are left out."""
    layer = _LAYER.match(name)
    extra = getattr(config, EXTRA_LAYERS, 0)
    return layer is not None and 0 <= int(layer[1]) - config.num_hidden_layers < extra


def without_extra_layers(config: DeepseekV2Config) -> None:
    """Set their number to 0, in place: the model has none, so neither has what is saved of it."""
    if getattr(config, EXTRA_LAYERS, 0):
        setattr(config, EXTRA_LAYERS, 0)


def summed_up(names: Iterable[str], config: DeepseekV2Config) -> list[str]:
    """Names of tensors for a message, with those of layers for multi-token prediction as one entry per layer."""
    counts: dict[str, int] = {}
    short = []
    for name in names:
        layer = _LAYER.match(name)
        if layer is not None and is_extra_layer(name, config):
            counts[layer[0]] = counts.get(layer[0], 0) + 1
        else:
            short.append(name)
    return short + [f"{layer}* ({count} tensors of multi-token prediction)" for layer, count in counts.items()]


def dtype_on_disk(name: str, dtype: Any) -> Any:
    """The dtype (a safetensors code or a torch.dtype) of a tensor in a file whose weights are in `dtype`: the bias of a
    router stays float32."""
    if not name.endswith(CORRECTION_BIAS):
        return dtype
    return torch.float32 if isinstance(dtype, torch.dtype) else "F32"
