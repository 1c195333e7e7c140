"""The latent cache: a token and layer cost kv_lora_rank + qk_rope_head_dim values, never expanded keys and values."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .configuration import DeepseekV2Config

SPARE_TOKENS = 64  # room kept free at least, so that most decoding steps copy one token only


class LatentLayer(DynamicLayer):
    """One layer's latents and rotary keys, side by side in one buffer [B, 1, capacity, C + R] with spare room.

    `keys` and `values` are views of the filled part (latent [B, 1, T, C], rotary key [B, 1, T, R]), so that
    transformers' crop, reorder, repeat and select work on them unchanged; an `update` after one of those
    starts a new buffer.
    """

    buffer: torch.Tensor | None = None

    def _reserve(self, latent: torch.Tensor, rope_key: torch.Tensor, past: int) -> torch.Tensor:
        needed = past + latent.shape[2]
        buffer, width = self.buffer, latent.shape[3] + rope_key.shape[3]
        mine = past == 0 or (buffer is not None and self.keys is not None and self.keys.data_ptr() == buffer.data_ptr())
        if buffer is None or not mine or buffer.shape[2] < needed or buffer.shape[0] != latent.shape[0]:
            room = needed + max(SPARE_TOKENS, needed // 8)
            buffer = latent.new_empty(latent.shape[0], 1, room, width)
            if past and self.keys is not None and self.values is not None:
                torch.cat((self.keys, self.values), dim=-1, out=buffer[:, :, :past])
        return buffer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        past, width = self.get_seq_length(), key_states.shape[3]
        total = past + key_states.shape[2]
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # Writing into a buffer would break the graph: keep plain concatenation under autograd.
            return super().update(key_states, value_states) if past else self._keep(key_states, value_states)
        self.buffer = self._reserve(key_states, value_states, past)
        self.buffer[:, :, past:total, :width] = key_states
        self.buffer[:, :, past:total, width:] = value_states
        return self._keep(self.buffer[:, :, :total, :width], self.buffer[:, :, :total, width:])

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def reset(self) -> None:
        self.buffer = None
        super().reset()

    @property
    def nbytes(self) -> int:
        held = [t.untyped_storage() for t in (self.buffer, self.keys, self.values) if t is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


class LatentCache(Cache):
    """Cache of a DeepSeek-V2 model; `generate` makes one when it is given none.

    `update(latent [B, 1, T, kv_lora_rank], rope_key [B, 1, T, qk_rope_head_dim], layer_idx)` stores both and
    returns both for all tokens so far.
    """

    def __init__(self, config: DeepseekV2Config):
        super().__init__(layers=[LatentLayer() for _ in range(config.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all storage that the cache holds, spare room included."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, LatentLayer))
