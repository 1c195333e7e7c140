"""The latent cache: kv_lora_rank + qk_rope_head_dim values per token and layer instead of expanded keys and values.

A model with plain attention keeps its values in the place of the latent, and its rotated keys in that of the rotary
key, those of all heads side by side.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache_codecs import BLOCK, WIDTHS, GroupCodec, RawCodec
from .configuration import DeepseekV2Config
from .errors import ModelError

Quantization = Literal["int8", "int6", "int4"]


class LatentLayer(CacheLayerMixin):
    """One layer's encoded latents and rotary keys, in a buffer [B, capacity, width] whose first `length` tokens are
    filled."""

    is_sliding = False
    is_croppable = True

    def __init__(self, codec: RawCodec | GroupCodec):
        super().__init__()
        self.codec, self.length = codec, 0
        self.buffer: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.widths = (key_states.shape[-1], value_states.shape[-1])
        self.is_initialized = True

    def _room_for(self, new: torch.Tensor) -> torch.Tensor:
        """The buffer, grown if necessary to have capacity for `new` [B, T, width] after the filled tokens."""
        needed = self.length + new.shape[1]
        if self.buffer is not None and self.buffer.shape[1] >= needed:
            return self.buffer
        capacity = needed if self.buffer is None else self.codec.capacity(needed)
        buffer = new.new_zeros(new.shape[0], capacity, new.shape[2])  # zeros: `with_room` exposes unfilled tokens
        if self.buffer is not None:
            buffer[:, : self.length] = self.buffer[:, : self.length]
        return buffer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the latents [B, 1, T, C] and rotary keys [B, 1, T, R] of new tokens, and return both for all tokens so
        far.

        The first call returns its arguments unchanged. Under autograd earlier tokens are constants: no gradient reaches
        an earlier forward.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        with torch.no_grad():
            past, new = self.length, self.codec.encode(key_states, value_states)
            self.buffer = self._room_for(new)
            self.length = past + new.shape[1]
            self.buffer[:, past : self.length] = new
        if past == 0:
            return key_states, value_states
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            earlier = self.codec.decode(self.buffer[:, :past].clone(), self.widths, key_states.dtype)
            return torch.cat((earlier[0], key_states), 2), torch.cat((earlier[1], value_states), 2)
        latent, rope_key = self.codec.decode(self.buffer[:, : self.length], self.widths, key_states.dtype)
        return latent, rope_key

    def stored(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The decoded latents and rotary keys of all tokens so far; Nones if empty."""
        if self.buffer is None:
            return None, None
        latent, rope_key = self.codec.decode(self.buffer[:, : self.length], self.widths, self.dtype)
        return latent, rope_key

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def _transform(self, function: Any) -> None:
        if self.buffer is not None:
            self.buffer = function(self.buffer)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens (transformers passes a number that is not positive)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._transform(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._transform(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._transform(lambda buffer: buffer[indices])

    def offload(self) -> None:
        self._transform(lambda buffer: buffer.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._transform(lambda buffer: buffer.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self.buffer, self.length, self.is_initialized = None, 0, False

    @property
    def nbytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.untyped_storage().nbytes()


class SlotLayer(CacheLayerMixin):
    """One layer of a SlotCache: a buffer [B, columns, width], of which `update` returns all columns."""

    is_sliding = False

    def __init__(self, like: Any, slots: int, columns: int):
        super().__init__()
        self.codec, self.widths = like.codec, like.widths
        self.buffer: torch.Tensor = like.buffer.new_zeros(slots, columns, like.buffer.shape[2])
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Everything is allocated in __init__."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like LatentLayer's, for one token per row, stored at `args`: (rows [B], columns [B])."""
        rows, columns = args
        self.buffer[rows, columns] = self.codec.encode(key_states, value_states)[:, 0]
        latent, rope_key = self.codec.decode(self.buffer, self.widths, key_states.dtype)
        return latent, rope_key

    def resize(self, columns: int) -> None:
        buffer = self.buffer.new_zeros(self.buffer.shape[0], columns, self.buffer.shape[2])
        kept = min(columns, self.buffer.shape[1])
        buffer[:, :kept] = self.buffer[:, :kept]
        self.buffer = buffer

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.buffer.shape[1], 0

    def get_seq_length(self) -> int:
        return self.buffer.shape[1] - 1

    def get_max_length(self) -> int:
        return self.buffer.shape[1]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.buffer = self.buffer[indices]


class SlotCache(Cache):
    """Cache for decoding rows of different lengths: row b is stored from column 0, its next token goes to column
    `place[b]`, and `mask` tells which columns are filled.

    Its tensors keep their addresses until `resize` or `batch_select_indices`, as a CUDA graph requires.

    Args:
        like: a filled LatentCache, for the widths and the codec.
    """

    layers: list[SlotLayer]

    def __init__(self, like: Cache, slots: int, columns: int):
        super().__init__(layers=[SlotLayer(layer, slots, columns) for layer in like.layers])
        device = self.layers[0].buffer.device
        self.rows = torch.arange(slots, device=device)
        self.place = torch.zeros(slots, dtype=torch.long, device=device)
        self.target = self.place

    @property
    def columns(self) -> int:
        return self.layers[0].buffer.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(layer.buffer.untyped_storage().nbytes() for layer in self.layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[layer_idx].update(key_states, value_states, self.rows, self.target)

    def mask(self) -> torch.Tensor:
        """Before each step, [B, columns]: True on the filled columns and the one of the next token. Rows that have
        finished may run out of columns and stay at the last one."""
        self.target = self.place.clamp(max=self.columns - 1)
        return torch.arange(self.columns, device=self.place.device) <= self.target[:, None]

    def fill(self, slots: Sequence[int], prefilled: Cache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Copies rows of a left-padded LatentCache, the last lengths tokens of each, into slots."""
        into, source_rows, tokens = (torch.tensor(n, device=self.place.device) for n in (slots, rows, lengths))
        total, longest = prefilled.get_seq_length(), max(lengths)
        columns = torch.arange(longest, device=into.device) + (total - tokens)[:, None]
        columns = columns.clamp(max=total - 1)  # behind a shorter row, where nothing is looked at
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            assert isinstance(source, LatentLayer) and source.buffer is not None
            layer.buffer[:, :longest].index_copy_(0, into, source.buffer[source_rows[:, None], columns])
        self.place[into] = tokens

    def resize(self, columns: int) -> None:
        for layer in self.layers:
            layer.resize(columns)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.place, self.rows = self.place[indices], self.rows[: len(indices)]


class SlotRows(Cache):
    """Some rows of a SlotCache, for a forward on several new tokens of each of them.

    Args:
        rows: [R], which ones.
        columns: [R, T], where each new token belongs.
        real: [R, T] bool, which of the new tokens are stored; the others are padding.
    """

    layers: list[SlotLayer]

    def __init__(self, slots: SlotCache, rows: torch.Tensor, columns: torch.Tensor, real: torch.Tensor):
        super().__init__(layers=[*slots.layers])
        self.rows, self.real = rows, real
        self.place = rows[:, None].expand(columns.shape)[real], columns[real]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the latents [R, 1, T, C] and rotary keys [R, 1, T, R'], and return all columns of these rows."""
        layer = self.layers[layer_idx]
        layer.buffer[self.place] = layer.codec.encode(key_states, value_states)[self.real]
        latent, rope_key = layer.codec.decode(layer.buffer[self.rows], layer.widths, key_states.dtype)
        return latent, rope_key


def whole_blocks(tokens: int) -> int:
    """A number of tokens rounded up to a multiple of BLOCK: matrix kernels are several times slower for other
    lengths."""
    return -(-tokens // BLOCK) * BLOCK


def joined(latent: torch.Tensor, rope_key: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, C] and [B, 1, S, R] -> [B, S, C + R], without a copy if they are adjacent in memory, as in a
    LatentCache."""
    latent, rope_key = latent.squeeze(1), rope_key.squeeze(1)
    width, offset = latent.shape[-1] + rope_key.shape[-1], latent.storage_offset()
    is_adjacent = (
        latent.untyped_storage().data_ptr() == rope_key.untyped_storage().data_ptr()
        and rope_key.storage_offset() == offset + latent.shape[-1]
        and latent.stride() == rope_key.stride()
        and not (latent.requires_grad or rope_key.requires_grad)
    )
    if is_adjacent:
        return latent.as_strided((*latent.shape[:2], width), latent.stride(), offset)
    return torch.cat((latent, rope_key), dim=-1)


def with_room(keys: torch.Tensor) -> torch.Tensor:
    """Extend keys [B, S, W] of a LatentCache to a multiple of BLOCK tokens by a view that includes unfilled tokens of
    its buffer (zeros, or tokens that were dropped). Other keys are returned unchanged.
    """
    tokens, width = keys.shape[1:]
    missing = -tokens % BLOCK
    spare = keys.stride(0) // width - tokens if keys.stride(1) == width else 0
    end = keys.storage_offset() + (keys.shape[0] - 1) * keys.stride(0) + (tokens + missing) * width
    if spare < missing or end * keys.itemsize > keys.untyped_storage().nbytes():
        return keys
    return keys.as_strided((keys.shape[0], tokens + missing, width), keys.stride())


class LatentCache(Cache):
    """The cache of a model of this package; `generate` creates one if none is passed.

    `update(latent [B, 1, T, kv_lora_rank], rope_key [B, 1, T, qk_rope_head_dim], layer_idx)` stores both and returns
    both for all tokens so far.

    quantization: None stores values in the model's dtype; "int8", "int6" and "int4" store quantised groups. "int6"
        takes at most six bits per value, including scales and spare capacity: the average stated in the paper.

    Raises:
        ModelError: the quantization is not supported.
    """

    def __init__(self, config: DeepseekV2Config, quantization: Quantization | None = None):
        if quantization is not None and quantization not in WIDTHS:
            raise ModelError(f'quantization "{quantization}" is not supported: use None, {", ".join(WIDTHS)}')
        codec = RawCodec() if quantization is None else GroupCodec(quantization, *config.attention_sizes.cached)
        super().__init__(layers=[LatentLayer(codec) for _ in range(config.num_hidden_layers)])

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """The decoded (latents [B, 1, T, C], rotary keys [B, 1, T, R]) of each layer; Nones if it is empty."""
        return (layer.stored() for layer in self.layers if isinstance(layer, LatentLayer))

    @property
    def nbytes(self) -> int:
        """Bytes of all storage that the cache holds, including scales and spare capacity."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, LatentLayer))
