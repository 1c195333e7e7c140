"""The latent cache: stores kv_lora_rank + qk_rope_head_dim values per token and layer, not expanded keys and values."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache_codecs import BLOCK, WIDTHS, GroupCodec, RawCodec
from .configuration import DeepseekV2Config
from .errors import ModelError

Quantization = Literal["int8", "int6", "int4"]


class LatentLayer(CacheLayerMixin):
    """One layer's latents and rotary keys, encoded, in one buffer [B, capacity, width] of which `length` is filled."""

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
        """The buffer with room for `new` [B, T, width] behind what is filled."""
        needed = self.length + new.shape[1]
        if self.buffer is not None and self.buffer.shape[1] >= needed:
            return self.buffer
        if self.buffer is None:
            capacity = whole_blocks(needed + self.reserved) if self.reserved else needed
        else:
            capacity = self.codec.capacity(needed)
        buffer = new.new_zeros(new.shape[0], capacity, new.shape[2])  # `with_room` reads behind what is filled
        if self.buffer is not None:
            buffer[:, : self.length] = self.buffer[:, : self.length]
        return buffer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores latent [B, 1, T, C] and rotary key [B, 1, T, R]; both for all tokens so far come back.

        The first tokens come back as they were given. Under autograd the tokens before are constants: no
        gradient reaches an earlier forward.
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
            before = self.codec.decode(self.buffer[:, :past].clone(), self.widths, key_states.dtype)
            return torch.cat((before[0], key_states), 2), torch.cat((before[1], value_states), 2)
        latent, rope_key = self.codec.decode(self.buffer[:, : self.length], self.widths, key_states.dtype)
        return latent, rope_key

    def stored(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Latent and rotary key of all tokens so far."""
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

    def _rows(self, pick: Any) -> None:
        if self.buffer is not None:
            self.buffer = pick(self.buffer)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens (transformers passes a number up to 0)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._rows(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(lambda buffer: buffer[indices])

    def offload(self) -> None:
        self._rows(lambda buffer: buffer.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._rows(lambda buffer: buffer.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self.buffer, self.length, self.is_initialized = None, 0, False

    @property
    def nbytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.untyped_storage().nbytes()


class FixedLayer(CacheLayerMixin):
    """A LatentLayer with room reserved for `capacity` tokens, all of which are handed out: a mask has to say which ones
    are filled. New tokens go where `place` [1] says, a tensor, so that a CUDA graph can move on."""

    is_sliding = False

    def __init__(self, layer: Any, place: torch.Tensor, capacity: int):
        super().__init__()
        self.codec, self.widths, self.place = layer.codec, layer.widths, place
        self.buffer: torch.Tensor = layer.buffer[:, :capacity]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As LatentLayer's, for one token a row; what comes back is `capacity` long."""
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
    """Rounded up to a multiple of BLOCK: a matrix kernel for rows of another length is several times slower."""
    return -(-tokens // BLOCK) * BLOCK


def joined(latent: torch.Tensor, rope_key: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, C] and [B, 1, S, R] -> [B, S, C + R]: no copy where they lie side by side, as in a LatentCache."""
    latent, rope_key = latent.squeeze(1), rope_key.squeeze(1)
    width, offset = latent.shape[-1] + rope_key.shape[-1], latent.storage_offset()
    beside = (
        latent.untyped_storage().data_ptr() == rope_key.untyped_storage().data_ptr()
        and rope_key.storage_offset() == offset + latent.shape[-1]
        and latent.stride() == rope_key.stride()
        and not (latent.requires_grad or rope_key.requires_grad)
    )
    if beside:
        return latent.as_strided((*latent.shape[:2], width), latent.stride(), offset)
    return torch.cat((latent, rope_key), dim=-1)


def with_room(keys: torch.Tensor) -> torch.Tensor:
    """keys [B, S, W] of a LatentCache with the tokens behind them, up to a whole BLOCK: zeros, or forgotten ones.

    Other keys come back as they are.
    """
    tokens, width = keys.shape[1:]
    missing = -tokens % BLOCK
    room = keys.stride(0) // width - tokens if keys.stride(1) == width else 0
    end = keys.storage_offset() + (keys.shape[0] - 1) * keys.stride(0) + (tokens + missing) * width
    if room < missing or end * keys.itemsize > keys.untyped_storage().nbytes():
        return keys
    return keys.as_strided((keys.shape[0], tokens + missing, width), keys.stride())


class LatentCache(Cache):
    """Cache of a DeepSeek-V2 model; `generate` creates one if none is given.

    `update(latent [B, 1, T, kv_lora_rank], rope_key [B, 1, T, qk_rope_head_dim], layer_idx)` stores both and
    returns both for all tokens so far.

    quantization: None keeps the model's dtype; "int8", "int6" and "int4" store packed groups. "int6" costs six
        bits a value with everything counted, the average of the paper.

    Raises:
        ModelError: another quantization.
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
        """Room for so many tokens behind the first ones that an empty cache is given."""
        self.reserved = tokens
        for layer in self.layers:
            assert isinstance(layer, LatentLayer)
            layer.reserved = tokens

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """(latent [B, 1, T, C], rotary key [B, 1, T, R]) of each layer, decoded; Nones where nothing is stored yet."""
        return (layer.stored() for layer in self.layers if isinstance(layer, LatentLayer))

    @property
    def nbytes(self) -> int:
        """Bytes of all storage that the cache holds, scales and spare room included."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, LatentLayer))
