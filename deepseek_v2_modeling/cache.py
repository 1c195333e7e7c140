"""The latent cache: kv_lora_rank + qk_rope_head_dim values per token and layer instead of expanded keys and values."""

from collections.abc import Iterator
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
        self.codec, self.length, self.reserved = codec, 0, 0
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
        if self.buffer is None:
            capacity = whole_blocks(needed + self.reserved) if self.reserved else needed
        else:
            capacity = self.codec.capacity(needed)
        buffer = new.new_zeros(
            new.shape[0], capacity, new.shape[2]
        )  # zeros, because `with_room` exposes unfilled tokens
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


class FixedLayer(CacheLayerMixin):
    """A LatentLayer of fixed capacity that always returns all `capacity` tokens; a mask has to tell which are filled.

    New tokens are written at index `place` [1], a tensor, so that a replayed CUDA graph can advance it.
    """

    is_sliding = False

    def __init__(self, layer: Any, place: torch.Tensor, capacity: int):
        super().__init__()
        self.codec, self.widths, self.place = layer.codec, layer.widths, place
        self.buffer: torch.Tensor = layer.buffer[:, :capacity]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """No-op: the buffer exists already."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like LatentLayer's, for one token per row; the results have `capacity` tokens."""
        self.buffer.index_copy_(1, self.place, self.codec.encode(key_states, value_states))
        latent, rope_key = self.codec.decode(self.buffer, self.widths, key_states.dtype)
        return latent, rope_key

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.buffer.shape[1], 0

    def get_seq_length(self) -> int:
        return self.buffer.shape[1] - 1

    def get_max_length(self) -> int:
        return self.buffer.shape[1]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.buffer = self.buffer[indices]


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
    """The cache of a DeepSeek-V2 model; `generate` creates one if none is passed.

    `update(latent [B, 1, T, kv_lora_rank], rope_key [B, 1, T, qk_rope_head_dim], layer_idx)` stores both and returns
    both for all tokens so far.

    quantization: None stores values in the model's dtype; "int8", "int6" and "int4" store quantized groups. "int6"
        takes at most six bits per value, including scales and spare capacity: the average stated in the paper.

    Raises:
        ModelError: the quantization is not supported.
    """

    def __init__(self, config: DeepseekV2Config, quantization: Quantization | None = None):
        if quantization is not None and quantization not in WIDTHS:
            raise ModelError(f'quantization "{quantization}" is not supported: use None, {", ".join(WIDTHS)}')
        if quantization is None:
            codec = RawCodec()
        else:
            codec = GroupCodec(quantization, config.kv_lora_rank, config.qk_rope_head_dim)
        super().__init__(layers=[LatentLayer(codec) for _ in range(config.num_hidden_layers)])

    reserved = 0

    def reserve(self, tokens: int) -> None:
        """Make an empty cache allocate capacity for this many tokens after the prompt."""
        self.reserved = tokens
        for layer in self.layers:
            assert isinstance(layer, LatentLayer)
            layer.reserved = tokens

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """The decoded (latents [B, 1, T, C], rotary keys [B, 1, T, R]) of each layer; Nones if it is empty."""
        return (layer.stored() for layer in self.layers if isinstance(layer, LatentLayer))

    @property
    def nbytes(self) -> int:
        """Bytes of all storage that the cache holds, including scales and spare capacity."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, LatentLayer))
