"""Tensors that are read when they are used: experts are fused, weights quantised and fp8 weights scaled while they are
read, so that no parameter ever exists twice.

transformers loads them in place of tensors: it calls [...] on them, and then `to`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..configuration import FP8_BLOCK
from ..errors import ModelError
from ..kernels.quantized_weights import Storage
from .finite import check_finite
from .hub_layout import Shape
from .tensor_files import TensorInfo, info_of, row_blocks

Place = tuple[int, slice] | None  # expert and rows of a fused parameter; None for a whole parameter
SCALES = "_scale_inv"  # ends the name of the scales of an fp8 weight


@dataclass
class FusedExperts:
    """A fused parameter, of the unread tensors of its experts."""

    shape: Shape
    pieces: list[tuple[tuple[int, slice], Any]] = field(default_factory=list)

    def __getitem__(self, _: Any) -> "FusedExperts":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        fused = torch.empty(self.shape, device=device, dtype=dtype)
        self.fill(fused, 0)
        return fused

    def fill(self, part: torch.Tensor, first: int) -> None:
        """Read the experts from `first` on into part [experts, ...]."""
        for (expert, rows), source in self.pieces:
            if 0 <= expert - first < len(part):
                part[expert - first, rows] = source[...]


@dataclass
class QuantizedSource:
    """A quantised parameter, checked before it is quantised: reading raises ModelError for numbers that are not finite.

    where: the model, for the message. pieces: (name on disk, where it belongs, unread tensor).
    """

    storage: Storage
    where: str
    pieces: list[tuple[str, Place, Any]] = field(default_factory=list)

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
            values = check_finite(name, source[...], self.where)
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


@dataclass
class BlockScaled:
    """A weight `X` in fp8 (e4m3) with its scales `X_scale_inv` [rows / 128, columns / 128], rounded up, as in the files
    of DeepSeek-V3: a value is the stored number times its block's scale (inference/fp8_cast_bf16.py and kernel.py of
    DeepSeek-V3). Each is a tensor or a slice of a file (or an entry of a header, whose values are not read).

    `[...]` gives all values in float32, computed block by block of rows; `[a:b]` those of some rows, without
    the others.
    """

    weight: Any
    scales: Any

    def get_shape(self) -> list[int]:
        return list(info_of(self.weight).shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows, columns = self.get_shape()
        first, last, _ = (index if isinstance(index, slice) else slice(None)).indices(rows)
        scales = self.scales[:].float()
        values = torch.empty(max(last - first, 0), columns)
        for start in range(first - first % FP8_BLOCK, last, FP8_BLOCK):
            part = slice(max(start, first), min(start + FP8_BLOCK, last))
            by_column = scales[start // FP8_BLOCK].repeat_interleave(FP8_BLOCK)[:columns]
            values[part.start - first : part.stop - first] = self.weight[part].float() * by_column
        return values


def with_scales(where: str, sources: Mapping[str, Any]) -> dict[str, Any]:
    """The sources with each fp8 weight and its scales as one. Scales of anything else stay, and are unexpected.

    Raises:
        ModelError: scales of another shape or type than blocks of 128 x 128 have.
    """
    joined = dict(sources)
    for name, scales in sources.items():
        weight = name.removesuffix(SCALES)
        if weight == name or weight not in sources or (stored := info_of(sources[weight])).dtype != "F8_E4M3":
            continue
        found, wanted = info_of(scales), TensorInfo("F32", tuple(-(-size // FP8_BLOCK) for size in stored.shape))
        if found != wanted:
            raise ModelError(
                f"{where}: {name} is {found.dtype} {list(found.shape)}, not F32 {list(wanted.shape)}: fp8 weights "
                f"are read with scales of blocks of {FP8_BLOCK} x {FP8_BLOCK}"
            )
        joined[weight] = BlockScaled(sources[weight], joined.pop(name))
    return joined
