"""Packed low-bit storage of latents and rotary keys.

Quantization is symmetric and per group: up to GROUP neighbouring channels of a token share a float16 scale. "int6"
takes at most six bits per value in total (the paper's average, section 3.2.2): to make up for scales and spare
capacity, the last channels of the latent get five bits. "int8" and "int4" take 8 and 4 bits plus the scales.

A b-bit number is stored in planes of 4, 2 and 1 bits (6 = 4 + 2, 5 = 4 + 1), each packed into bytes separately.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F

BLOCK = 64  # tokens; unquantised buffers grow by whole blocks
RAW_SPARE = 8  # unquantised buffers grow by an extra 1/8, so that they are rarely copied
SPARE = 128  # quantised ones by 1/128: spare capacity counts in bits per value, and copies are small
GROUP = 128  # channels
SCALE_BITS = 16
WIDTHS = {"int8": 8, "int6": 6, "int4": 4}
PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,)}


def pack_plane(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack numbers below 2^bits: uint8 [..., n] -> uint8 [..., ceil(n * bits / 8)]."""
    if bits == 8:
        return values
    per_byte = 8 // bits
    values = F.pad(values, (0, -values.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = values[..., 0].clone()
    for i in range(1, per_byte):
        packed |= values[..., i] << (bits * i)
    return packed


def unpack_plane(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_plane`, for `count` numbers."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :count]


@dataclass(frozen=True)
class Part:
    """`width` consecutive channels, stored with `bits` bits each."""

    width: int
    bits: int

    @property
    def nbytes(self) -> int:
        return sum(-(-self.width * plane // 8) for plane in PLANES[self.bits])

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Signed codes (int8 [..., width]) -> uint8 [..., nbytes]."""
        unsigned = (codes.to(torch.int16) + 2 ** (self.bits - 1)).to(torch.uint8)
        planes, shift = [], 0
        for plane in PLANES[self.bits]:
            planes.append(pack_plane((unsigned >> shift) & (2**plane - 1), plane))
            shift += plane
        return torch.cat(planes, dim=-1)

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        """uint8 [..., nbytes] -> signed codes, int16 [..., width]."""
        unsigned, shift, start = torch.zeros((), dtype=torch.uint8, device=stored.device), 0, 0
        for plane in PLANES[self.bits]:
            length = -(-self.width * plane // 8)
            unsigned = unsigned | (unpack_plane(stored[..., start : start + length], plane, self.width) << shift)
            shift, start = shift + plane, start + length
        return unsigned.to(torch.int16) - 2 ** (self.bits - 1)


def group_widths(channels: int) -> list[int]:
    """The widths of the groups that channels are divided into: GROUP each, and the rest."""
    return [GROUP] * (channels // GROUP) + ([channels % GROUP] if channels % GROUP else [])


@dataclass(frozen=True)
class RawCodec:
    """No quantization: stores latents and rotary keys side by side."""

    def capacity(self, tokens: int) -> int:
        """The capacity, in tokens, to which a buffer grows that needs to hold `tokens`."""
        return -(-(tokens + tokens // RAW_SPARE) // BLOCK) * BLOCK

    def encode(self, latent: torch.Tensor, rope_key: torch.Tensor) -> torch.Tensor:
        """[B, 1, T, C] and [B, 1, T, R] -> [B, T, C + R]."""
        return torch.cat((latent, rope_key), dim=-1).squeeze(1)

    def decode(self, stored: torch.Tensor, widths: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """[B, T, C + R] -> views ([B, 1, T, C], [B, 1, T, R])."""
        return stored.unsqueeze(1).split(widths, dim=-1)


@dataclass(frozen=True)
class GroupCodec:
    """Symmetric group quantization of latents (C channels) and rotary keys (R channels)."""

    name: str
    latent_width: int
    rope_width: int

    def capacity(self, tokens: int) -> int:
        """Like RawCodec's."""
        return tokens + tokens // SPARE

    @cached_property
    def groups(self) -> list[int]:
        return group_widths(self.latent_width) + group_widths(self.rope_width)

    @cached_property
    def parts(self) -> list[Part]:
        """The latent channels, the last of which have fewer bits with "int6", then the rotary channels."""
        bits, narrow = WIDTHS[self.name], 0
        if self.name == "int6":
            spare_bits = bits * (self.latent_width + self.rope_width) / SPARE
            narrow = math.ceil((len(self.groups) * SCALE_BITS + spare_bits) / 8) * 8  # whole bytes of each plane
            narrow = min(self.latent_width, narrow)
        split = [Part(self.latent_width - narrow, bits), Part(narrow, bits - 1), Part(self.rope_width, bits)]
        return [part for part in split if part.width]

    @cached_property
    def _limits(self) -> torch.Tensor:
        """Largest code of each channel, [C + R]."""
        return torch.cat([torch.full((part.width,), float(2 ** (part.bits - 1) - 1)) for part in self.parts])

    def _spread(self, by_group: torch.Tensor) -> torch.Tensor:
        """Repeat a value per group [..., groups] for each of its channels [..., C + R]."""
        repeats = torch.tensor(self.groups, device=by_group.device)
        return by_group.repeat_interleave(repeats, dim=-1, output_size=self.latent_width + self.rope_width)

    def encode(self, latent: torch.Tensor, rope_key: torch.Tensor) -> torch.Tensor:
        """[B, 1, T, C] and [B, 1, T, R] -> uint8 [B, T, bytes]: scales first, then the packed codes."""
        values = torch.cat((latent, rope_key), dim=-1).squeeze(1).float()
        peaks = torch.stack([group.abs().amax(-1) for group in values.split(self.groups, dim=-1)], dim=-1)
        scales = peaks.clamp(min=1e-6, max=6e4).to(torch.float16)
        limits = self._limits.to(values.device)
        codes = (values / self._spread(scales.float()) * limits).round().clamp(-limits, limits).to(torch.int8)
        pieces = codes.split([part.width for part in self.parts], dim=-1)
        packed = [part.pack(piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return torch.cat([scales.contiguous().view(torch.uint8), *packed], dim=-1)

    def decode(self, stored: torch.Tensor, widths: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """uint8 [B, T, bytes] -> ([B, 1, T, C], [B, 1, T, R]) in `dtype`."""
        head = 2 * len(self.groups)
        scales = stored[..., :head].contiguous().view(torch.float16).float()
        sizes = [part.nbytes for part in self.parts]
        pieces = stored[..., head:].split(sizes, dim=-1)
        codes = torch.cat([part.unpack(piece) for part, piece in zip(self.parts, pieces, strict=True)], dim=-1)
        values = codes.float() * (self._spread(scales) / self._limits.to(stored.device))
        return values.to(dtype).unsqueeze(1).split(widths, dim=-1)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in one layer, scales included."""
        return 2 * len(self.groups) + sum(part.nbytes for part in self.parts)
