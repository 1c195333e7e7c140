"""Quantises weights while they are read, a piece at a time: no parameter ever exists in full precision."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ModelError
from ..kernels.quantized_weights import Storage
from .finite import is_finite
from .tensor_files import row_blocks

Place = tuple[int, slice] | None  # expert and rows of a fused parameter; None for a whole parameter


@dataclass
class QuantizedSource:
    """A lazy quantised parameter in the state dict that transformers loads, which calls [...] and then `to` on it.

    pieces: (name on disk, where it belongs, unread tensor). broken: names of pieces that are not finite, once read.
    """

    storage: Storage
    pieces: list[tuple[str, Place, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def __getitem__(self, _: Any) -> "QuantizedSource":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The stored weight, in its own dtype."""
        stored = torch.empty(self.storage.stored_shape, dtype=torch.uint8, device=device)
        self.fill(stored, 0)
        return stored

    def fill(self, stored: torch.Tensor, first: int) -> None:
        """Read the stored weight, or the part of it that holds the experts from `first` on."""
        for name, place, source in self.pieces:
            if place is not None:
                if not 0 <= place[0] - first < len(stored):
                    continue
                place = place[0] - first, place[1]
            values = source[...]
            if not is_finite(values):
                self.broken.append(name)
            for matrix, row, rows in _matrices(stored, place, values):
                for block, part in row_blocks(rows):
                    self.storage.write(matrix, row + block.start, part.to(stored.device, _readable(part.dtype)))


def _readable(dtype: torch.dtype) -> torch.dtype:
    """A dtype that kernels read."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def _matrices(
    stored: torch.Tensor, place: Place, values: torch.Tensor
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """(where a matrix is stored, its first row among these values, the values [R, I]) of a piece."""
    if place is not None:
        yield stored[place[0]], place[1].start, values
    elif values.ndim == 3:
        yield from ((matrix, 0, rows) for matrix, rows in zip(stored, values, strict=True))
    else:
        yield stored, 0, values


def check_read(where: str, sources: Mapping[str, Any]) -> None:
    """Raise ModelError if a weight that was quantised is not finite."""
    for source in sources.values():
        if isinstance(source, QuantizedSource) and source.broken:
            raise ModelError(f"{where}: {source.broken[0]} contains NaN or infinite values")
