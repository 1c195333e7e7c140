"""One decode step for a batch of rows: as it comes, or at fixed shapes and captured as a CUDA graph.

A step of V2-Lite is some 3,000 kernels of a few microseconds each; launched one by one from Python they take ten times
as long as they run. Captured once and replayed, they take as long as they run. For that every tensor of a step stays
where it is: the cache has its final length from the beginning, and the mask says how far it is filled.

B rows, S tokens of room, T tokens so far, V words.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache import FixedLayer, LatentCache, whole_blocks

logger = logging.get_logger(__name__)
WORTH_CAPTURING = 24  # steps; a capture costs about as much as three


class EagerStep:
    """The model on one more token for each row. mask [B, T]: 1 on the real tokens that the cache holds."""

    worth_dropping = 0.85  # ended rows leave the batch when this share or less is left

    def __init__(self, model: nn.Module, cache: LatentCache, mask: torch.Tensor):
        self.model, self.cache, self.mask = model, cache, mask

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B] -> logits of the next ones [B, V]."""
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), dim=1)
        positions = self.mask.sum(-1, keepdim=True) - 1
        return logits_of(self.model, tokens[:, None], self.mask, positions, self.cache)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


class FixedStep:
    """As EagerStep, for up to `steps` more tokens, at fixed shapes, on a cache with room reserved for them; captured
    where `capture` says so."""

    worth_dropping = 0.5  # each time costs another capture

    def __init__(self, model: nn.Module, cache: LatentCache, mask: torch.Tensor, steps: int, *, capture: bool = True):
        self.model, self.capture = model, capture
        self.place = torch.tensor([mask.shape[1]], device=mask.device)
        capacity = whole_blocks(mask.shape[1] + steps)
        self.cache = Cache(layers=[FixedLayer(layer, self.place, capacity) for layer in cache.layers])
        self.mask = F.pad(mask, (0, capacity - mask.shape[1]))
        self._prepare()

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B] -> logits of the next ones [B, V]; they hold until the next call."""
        self.tokens.copy_(tokens[:, None])
        if self.graph is None:
            return self._step()
        self.graph.replay()
        return self.logits

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
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
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._step()  # kernels are chosen and built; what it writes, the first real token overwrites
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self._step()
        self.place.copy_(place)
        self.mask.copy_(mask)
        self.graph = graph


def logits_of(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """[B, V] of the last of ids [B, T]."""
    out = model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return out.logits[:, -1]


def new_cache(model: nn.Module, steps: int) -> LatentCache:
    """An empty cache for a prompt and `steps` more tokens: with room for them where their steps can be captured."""
    cache = LatentCache(model.config)  # pyright: ignore[reportArgumentType]
    if steps >= WORTH_CAPTURING and can_capture(model):
        cache.reserve(steps)
    return cache


def decode_step(model: nn.Module, cache: LatentCache, mask: torch.Tensor, steps: int) -> EagerStep | FixedStep:
    """The fastest step there is on a filled cache of `new_cache`; one that cannot be captured runs as it comes, and
    that is said."""
    if steps and cache.reserved >= steps:
        try:
            return FixedStep(model, cache, mask, steps)
        except RuntimeError as error:
            logger.warning_once(f"decoding without a CUDA graph, which is slower: {error}")
    return EagerStep(model, cache, mask)


def can_capture(model: nn.Module) -> bool:
    """Whether the model is whole on one GPU, and nothing looks into its forwards (a recorded or replayed routing)."""
    kinds = {(parameter.device, type(parameter)) for parameter in model.parameters()}
    watched = any(getattr(m, "recordings", ()) or getattr(m, "replayed_routes", None) for m in model.modules())
    return not watched and len(kinds) == 1 and next(iter(kinds))[0].type == "cuda"
