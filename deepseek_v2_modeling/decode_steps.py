"""One decode step for a batch of rows: eager, or with static shapes and captured as a CUDA graph.

A decode step of V2-Lite launches about 3,000 kernels of a few microseconds each; launching them from Python takes ten
times as long as running them. Replaying a captured graph removes that overhead. A graph needs every tensor at a fixed
address, so the cache is allocated at its final length and the mask tells how much of it is filled.

B rows, S tokens of capacity, T tokens so far, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache import FixedLayer, LatentCache, whole_blocks

logger = logging.get_logger(__name__)
WORTH_CAPTURING = 24  # steps; a capture costs about as much as three eager steps


class EagerStep:
    """An eager forward on one more token per row. mask [B, T]: 1 on the real tokens in the cache."""

    worth_dropping = 0.85  # finished rows are dropped when less than this fraction of the rows is still generating

    def __init__(self, model: nn.Module, cache: LatentCache, mask: torch.Tensor):
        self.model, self.cache, self.mask = model, cache, mask

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B] -> logits of the next tokens [B, V]."""
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), dim=1)
        positions = self.mask.sum(-1, keepdim=True) - 1
        return logits_of(self.model, tokens[:, None], self.mask, positions, self.cache)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


class FixedStep:
    """Like EagerStep, with static shapes, for up to `steps` more tokens, for which the cache has reserved capacity;
    captured as a CUDA graph if `capture` is set."""

    worth_dropping = 0.5  # dropping rows costs another capture

    def __init__(self, model: nn.Module, cache: LatentCache, mask: torch.Tensor, steps: int, *, capture: bool = True):
        self.model, self.capture = model, capture
        self.place = torch.tensor([mask.shape[1]], device=mask.device)
        capacity = whole_blocks(mask.shape[1] + steps)
        self.cache = Cache(layers=[FixedLayer(layer, self.place, capacity) for layer in cache.layers])
        self.mask = F.pad(mask, (0, capacity - mask.shape[1]))
        self._prepare()

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B] -> logits of the next tokens [B, V], which the next call overwrites."""
        self.tokens.copy_(tokens[:, None])
        if self.graph is None:
            return self._step()
        self.graph.replay()
        return self.logits

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self._prepare()

    def _step(self) -> torch.Tensor:
        self.mask.index_fill_(1, self.place, 1)
        positions = self.mask.sum(-1, keepdim=True) - 1
        logits = logits_of(self.model, self.tokens, self.mask, positions, self.cache)
        self.place += 1
        return logits

    def _prepare(self) -> None:
        self.tokens = torch.zeros(len(self.mask), 1, dtype=torch.long, device=self.mask.device)
        self.graph: Any = None
        if not self.capture:
            return
        place, mask = self.place.clone(), self.mask.clone()
        warm_up_stream, current_stream = torch.cuda.Stream(), torch.cuda.current_stream()
        warm_up_stream.wait_stream(current_stream)
        with torch.cuda.stream(warm_up_stream):
            self._step()  # warm-up: selects and compiles kernels; the first real token overwrites what it wrote
        current_stream.wait_stream(warm_up_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self._step()
        self.place.copy_(place)
        self.mask.copy_(mask)
        self.graph = graph


def logits_of(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """The logits [B, V] of the last position of ids [B, T]."""
    out = model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return out.logits[:, -1]


def new_cache(model: nn.Module, steps: int) -> LatentCache:
    """An empty cache for a prompt and `steps` more tokens, with capacity reserved for them if the steps can be
    captured."""
    cache = LatentCache(model.config)  # pyright: ignore[reportArgumentType]
    if steps >= WORTH_CAPTURING and can_capture(model):
        cache.reserve(steps)
    return cache


def decode_step(model: nn.Module, cache: LatentCache, mask: torch.Tensor, steps: int) -> EagerStep | FixedStep:
    """The fastest step available on a prefilled cache from `new_cache`. If capturing fails, logs a warning and falls
    back to eager steps."""
    if steps and cache.reserved >= steps:
        try:
            return FixedStep(model, cache, mask, steps)
        except RuntimeError as error:
            logger.warning_once(f"decoding without a CUDA graph, which is slower: {error}")
    return EagerStep(model, cache, mask)


def can_capture(model: nn.Module) -> bool:
    """Whether the whole model is on one GPU and its routing is neither recorded nor replayed."""
    placements = {(parameter.device, type(parameter)) for parameter in model.parameters()}
    watched = any(getattr(m, "recordings", ()) or getattr(m, "replayed_routes", None) for m in model.modules())
    return not watched and len(placements) == 1 and next(iter(placements))[0].type == "cuda"
