"""Decode steps for a batch of slots, each with a row of its own length: eager, or with static shapes and captured as a
CUDA graph.

A decode step of V2-Lite launches about 3,000 kernels of a few microseconds each; launching them from Python takes ten
times as long as running them. Replaying a captured graph removes that overhead. A graph needs every tensor at a fixed
address, so the cache is allocated at its final length and the mask tells how much of each row is filled.

B slots, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache import LatentCache, SlotCache, whole_blocks

logger = logging.get_logger(__name__)
WORTH_CAPTURING = 24  # steps; a capture costs about as much as three eager steps
WORTH_DROPPING = 0.85  # empty slots are dropped when at most this fraction of the slots is still generating
WORTH_CAPTURING_AGAIN = 0.5  # the same where dropping slots costs another capture


class SlotDecoder:
    """Runs the model on one more token per slot.

    Args:
        like: a filled cache of the same model.
        columns: the length in tokens that a row may reach.
        fixed: allocate the cache at that length; otherwise it is as long as its longest row.
        capture: capture fixed steps as a CUDA graph. If that fails, logs a warning and decodes eagerly.
    """

    def __init__(
        self, model: nn.Module, like: Cache, slots: int, columns: int, *, fixed: bool = False, capture: bool = True
    ):
        self.model = model
        self.lengths = [0] * slots  # tokens of each row in the cache, 0 for an empty slot
        self.fixed, self.capture = fixed, capture
        self.cache = SlotCache(like, slots, whole_blocks(columns) if fixed else 1)
        self._prepare()

    @property
    def device(self) -> torch.device:
        return self.cache.place.device

    @property
    def worth_dropping(self) -> float:
        return WORTH_CAPTURING_AGAIN if self.graph is not None else WORTH_DROPPING

    def fill(self, slots: Sequence[int], prefilled: LatentCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy rows of a prefilled cache, left-padded, into slots; lengths: the number of tokens of each."""
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] = length
        self._fit()
        self.cache.fill(slots, prefilled, rows, lengths)

    def empty(self, slot: int) -> None:
        """Mark a slot whose row has finished."""
        self.lengths[slot] = 0

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all slots but these."""
        self.cache.batch_select_indices(torch.tensor(slots, device=self.device))
        self.lengths = [self.lengths[slot] for slot in slots]
        self._prepare()

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B] -> logits of the next tokens [B, V], which the next call overwrites."""
        self.tokens.copy_(tokens[:, None])
        self._fit()
        self.lengths = [length + 1 if length else 0 for length in self.lengths]
        if self.graph is None:
            return self._step()
        self.graph.replay()
        return self.logits

    def _fit(self) -> None:
        """Resize the cache to the longest row and its next token."""
        columns = whole_blocks(max(self.lengths) + 1)
        if not self.fixed and columns != self.cache.columns:
            self.cache.resize(columns)

    def _step(self) -> torch.Tensor:
        cache = self.cache
        logits = logits_of(self.model, self.tokens, cache.mask(), cache.place[:, None], cache)
        cache.place += 1
        return logits

    def _prepare(self) -> None:
        self.tokens = torch.zeros(len(self.lengths), 1, dtype=torch.long, device=self.device)
        self.graph: Any = None
        if self.fixed and self.capture:
            try:
                self.graph = self._captured()
            except RuntimeError as error:
                self.fixed = False
                logger.warning_once(f"decoding without a CUDA graph, which is slower: {error}")

    def _captured(self) -> Any:
        place = self.cache.place.clone()
        warm_up_stream, current_stream = torch.cuda.Stream(), torch.cuda.current_stream()
        warm_up_stream.wait_stream(current_stream)
        with torch.cuda.stream(warm_up_stream):
            self._step()  # warm-up: selects and compiles kernels; the first real token overwrites what it wrote
        current_stream.wait_stream(warm_up_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self._step()
        self.cache.place.copy_(place)
        return graph


def logits_of(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """The logits [B, V] of the last position of ids [B, T]."""
    out = model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return out.logits[:, -1]


def can_capture(model: nn.Module) -> bool:
    """Whether the whole model is on one GPU and its routing is neither recorded nor replayed."""
    placements = {(parameter.device, type(parameter)) for parameter in model.parameters()}
    watched = any(getattr(m, "recordings", ()) or getattr(m, "replayed_routes", None) for m in model.modules())
    return not watched and len(placements) == 1 and next(iter(placements))[0].type == "cuda"
