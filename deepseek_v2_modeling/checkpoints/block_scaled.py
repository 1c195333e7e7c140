"""fp8 weights with a scale for each block of 128 x 128, as DeepSeek-V3's files have them, read in float32.

A weight `X` is stored as e4m3, and `X_scale_inv` [rows / 128, columns / 128], rounded up, as float32: a value is the
stored number times its block's scale (inference/fp8_cast_bf16.py and kernel.py of DeepSeek-V3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ModelError
from ..refusals import FP8_BLOCK
from .tensor_files import code_of, shape_of

SUFFIX = "_scale_inv"


@dataclass
class BlockScaled:
    """A lazy tensor of these weights and scales, each a tensor or a slice of a file (or an entry of a header, whose
    values are not read). `[...]` gives all values in float32, computed block by block of rows; `[a:b]` those of some
    rows, without the others."""

    weight: Any
    scales: Any

    def get_shape(self) -> list[int]:
        return list(shape_of(self.weight))

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
        weight = name.removesuffix(SUFFIX)
        if weight == name or weight not in sources or code_of(sources[weight]) != "F8_E4M3":
            continue
        shape = shape_of(sources[weight])
        wanted = tuple(-(-size // FP8_BLOCK) for size in shape)
        if shape_of(scales) != wanted or code_of(scales) != "F32":
            raise ModelError(
                f"{where}: {name} is {code_of(scales)} {list(shape_of(scales))}, not F32 {list(wanted)}: fp8 weights "
                f"are read with scales of blocks of {FP8_BLOCK} x {FP8_BLOCK}"
            )
        joined[weight] = BlockScaled(sources[weight], joined.pop(name))
    return joined
