"""Frozen weights stored in 4 or 8 bits, whose values exist only while a product needs them (QLoRA, arXiv 2305.14314).

A stored weight takes the place of the weight among a module's parameters, as bytes: of each matrix [O, I] first the
codes of its values, then the scales in float32. It has as many dimensions as the weight, [B, 1] for [O, I] and
[E, B, 1] for [E, O, I], so that processes can share it, and experts be chosen, by the first one. Codes and scales are
bitsandbytes' own: nf4 of its Linear4bit, computed by its kernels; int8 of its Linear8bitLt, whose few operations are
here, since its kernels read float16 alone and return float32.

E experts, O outputs, I inputs, B bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import torch

from .float32_products import Linear, compute_dtype, widens

SchemeName = Literal["nf4", "int8"]
BLOCK = 64  # values of a row with one scale in nf4, as in QLoRA; rows must be a multiple of it
SCALE = 4  # bytes
MOST_INT8 = 127


class Scheme(NamedTuple):
    """A way to store values. per_byte, per_scale: how many values share a byte, and a scale (None: those of a row).
    library: whose kernels it needs.

    quantize: values [R, I] -> (codes, scales). dequantize: (codes, scales, [R, I], dtype) -> values in dtype.
    """

    per_byte: int
    per_scale: int | None
    library: str | None
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    dequantize: Callable[[torch.Tensor, torch.Tensor, tuple[int, int], torch.dtype], torch.Tensor]


def _to_nf4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.bitsandbytes.quantize_4bit(values, BLOCK, "nf4", torch.uint8)


def _from_nf4(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)


def _to_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = values.abs().amax(1).float()
    factors = MOST_INT8 / scales.clamp(min=torch.finfo(torch.float32).tiny)
    return (values * factors.unsqueeze(1)).round().to(torch.int8), scales


def _from_int8(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    values = torch.empty(shape, dtype=dtype, device=codes.device)
    return torch.mul(codes.view(torch.int8).view(shape), (scales / MOST_INT8).unsqueeze(1), out=values)


SCHEMES: dict[SchemeName, Scheme] = {
    "nf4": Scheme(2, BLOCK, "bitsandbytes", _to_nf4, _from_nf4),
    "int8": Scheme(1, None, None, _to_int8, _from_int8),
}


@dataclass(frozen=True)
class Storage:
    """How a weight of this shape, [O, I] or [E, O, I], is stored."""

    scheme: SchemeName
    shape: tuple[int, ...]

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """[O, I], of all experts one after the other."""
        return prod(self.shape[:-1]), self.shape[-1]

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one matrix."""
        return prod(self.shape[-2:]) // SCHEMES[self.scheme].per_byte

    @property
    def stored_shape(self) -> tuple[int, ...]:
        rows, columns = self.shape[-2:]
        scales = rows * columns // (SCHEMES[self.scheme].per_scale or columns)
        return *self.shape[:-2], self.code_bytes + scales * SCALE, 1

    def parts(self, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scales) of all matrices: views of a single one, of several copies."""
        bytes_GB = stored.reshape(-1, self.stored_shape[-2])
        codes, scales = bytes_GB[:, : self.code_bytes], bytes_GB[:, self.code_bytes :]
        return codes.reshape(-1), scales.view(torch.float32).reshape(-1)

    def write(self, stored: torch.Tensor, row: int, values: torch.Tensor) -> None:
        """Quantise consecutive rows [R, I] of one matrix, which is all that is stored, from row `row` on."""
        for place, new in zip(self.parts(stored), SCHEMES[self.scheme].quantize(values.contiguous()), strict=True):
            flat = new.reshape(-1).view(place.dtype)
            start = row * len(flat) // len(values)
            place[start : start + len(flat)] = flat


@dataclass(frozen=True, eq=False)
class Quantized:
    """A stored weight, used like a tensor of its shape: `to` and [expert] are all that products ask of a weight."""

    stored: torch.Tensor
    storage: Storage

    @property
    def shape(self) -> tuple[int, ...]:
        return self.storage.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> "Quantized":
        return Quantized(self.stored[expert], Storage(self.storage.scheme, self.shape[1:]))

    def is_contiguous(self) -> bool:
        return True  # as what `to` returns

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The values: a tensor of its own at each call."""
        codes, scales = self.storage.parts(self.stored)
        dequantize = SCHEMES[self.storage.scheme].dequantize
        return dequantize(codes, scales, self.storage.rows_and_columns, dtype).view(self.shape)


Weight = torch.Tensor | Quantized


def held(weight: Weight) -> tuple[torch.Tensor, Storage | None]:
    """A weight as autograd functions take and keep it: the tensor that holds it, and how it is stored."""
    return (weight.stored, weight.storage) if isinstance(weight, Quantized) else (weight, None)


def opened(tensor: torch.Tensor, storage: Storage | None) -> Weight:
    """The inverse of `held`."""
    return tensor if storage is None else Quantized(tensor, storage)


class _Product(torch.autograd.Function):
    """x [N, I] @ w^T in `dtype`: [N, O]. The weight is dequantised in the forward pass and again in the backward
    pass."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, storage: Storage, x_NI: torch.Tensor, stored: torch.Tensor
    ) -> torch.Tensor:
        wide = torch.float32 if widens(x_NI, len(x_NI)) else dtype
        ctx.save_for_backward(stored)
        ctx.storage, ctx.wide, ctx.x_dtype = storage, wide, x_NI.dtype
        with torch.autocast(x_NI.device.type, enabled=False):
            return (x_NI.to(wide) @ Quantized(stored, storage).to(wide).t()).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (stored,) = ctx.saved_tensors
        with torch.autocast(stored.device.type, enabled=False):
            dx = grads[0].to(ctx.wide) @ Quantized(stored, ctx.storage).to(ctx.wide)
        return None, None, dx.to(ctx.x_dtype), None


class QuantizedLinear(Linear):
    """A Linear whose weight is stored. storages: {"weight": how}."""

    storages: dict[str, Storage]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        storage = self.storages["weight"]
        y_NO = _Product.apply(compute_dtype(input), storage, input.flatten(0, -2), self.weight)
        y = y_NO.unflatten(0, input.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)
