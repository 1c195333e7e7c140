"""The hub's layout of a checkpoint: how tensors on disk map to the model's parameters.

On disk each projection of each expert is a separate tensor; in the model the experts of a layer are fused into one
parameter.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Fused parameter -> the projections of each expert that it holds, stacked along the rows.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# A buffer in some old checkpoints, which is ignored because it is computed from the config.
COMPUTED = r"rotary_emb\.inv_freq$"
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


@dataclass
class FusedExperts:
    """A lazy fused parameter in the state dict that transformers loads, which calls [...] and then `to` on it."""

    shape: Shape
    pieces: list[tuple[tuple[int, slice], Any]] = field(default_factory=list)

    def __getitem__(self, _: Any) -> "FusedExperts":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        fused = torch.empty(self.shape, device=device, dtype=dtype)
        for place, source in self.pieces:
            fused[place] = source[...]
        return fused
