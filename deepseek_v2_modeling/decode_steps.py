"""Decode steps for a batch of slots, each with a row of its own length: eager, or with static shapes and captured as a
CUDA graph.

A decode step of V2-Lite launches about 3,000 kernels of a few microseconds each; launching them from Python takes ten
times as long as running them. Replaying a captured graph removes that overhead. A graph needs every tensor at a fixed
address, so the cache is allocated at its final length and the mask tells how much of each row is filled.

B slots, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache import LatentCache, SlotCache, SlotRows, whole_blocks
from .layers.attention_plan import absorption_pays
from .routing_replay import record_routing

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
        record: keep the experts of what was read last in `routes`: of each MoE layer [B, 1, K] of a step, or [R, T, K].
    """

    def __init__(
        self,
        model: nn.Module,
        like: Cache,
        slots: int,
        columns: int,
        *,
        fixed: bool = False,
        capture: bool = True,
        record: bool = False,
    ):
        self.model, self.record = model, record
        self.routes: list[torch.Tensor] = []
        self.captured_routes: list[torch.Tensor] = []  # which the captured step overwrites
        self.lengths = [0] * slots  # tokens of each row in the cache, 0 for an empty slot
        self.paused: set[int] = set()  # slots whose row stays as it is in the meantime
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
        self.paused.discard(slot)

    def pause(self, slot: int) -> None:
        """Leave a slot's row as it is until `read` continues it: what steps make of it in the meantime is not kept."""
        self.paused.add(slot)

    def read(self, slots: Sequence[int], ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Read several new tokens of each of these slots: the logits [R, V] after the last ones. As many tokens at a
        time as absorbed attention pays for, which needs no keys and values of what is in the cache.

        ids, real: [R, T], padded on the left; 1 in `real` on tokens.
        """
        rows, start = (torch.tensor(n, device=self.device) for n in (slots, [self.lengths[slot] for slot in slots]))
        for slot, tokens in zip(slots, real.sum(-1).tolist(), strict=True):
            self.lengths[slot] += tokens
            self.paused.discard(slot)
        ids, real = ids.to(self.device), real.to(self.device)
        self._fit()
        columns = (start[:, None] + real.cumsum(-1) - 1).clamp(min=0)
        logits = torch.empty(0)
        with self._recording():
            for first, last in chunks(self.model.config, ids.shape[1]):
                part = slice(first, last)
                cache = SlotRows(self.cache, rows, columns[:, part], real[:, part].bool())
                mask = torch.arange(self.cache.columns, device=self.device) <= columns[:, part, None]
                logits = logits_of(self.model, ids[:, part], mask[:, None], columns[:, part], cache)
        self.cache.place[rows] = torch.tensor([self.lengths[slot] for slot in slots], device=self.device)
        return logits

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all slots but these."""
        self.paused = {place for place, slot in enumerate(slots) if slot in self.paused}
        self.cache.batch_select_indices(torch.tensor(slots, device=self.device))
        self.lengths = [self.lengths[slot] for slot in slots]
        self._prepare()

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B] -> logits of the next tokens [B, V], which the next call overwrites."""
        self.tokens.copy_(tokens[:, None])
        self._fit()
        self.lengths = [n + (n > 0 and slot not in self.paused) for slot, n in enumerate(self.lengths)]
        if self.graph is None:
            return self._step()
        self.graph.replay()
        self.routes = self.captured_routes
        return self.logits

    def _fit(self) -> None:
        """Resize the cache to the longest row and its next token."""
        columns = whole_blocks(max(self.lengths) + 1)
        if not self.fixed and columns != self.cache.columns:
            self.cache.resize(columns)

    def _step(self) -> torch.Tensor:
        cache = self.cache
        with self._recording():
            logits = logits_of(self.model, self.tokens, cache.mask(), cache.place[:, None], cache)
        cache.place += 1
        return logits

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Around forwards over one part of the new tokens after the other."""
        with record_routing(self.model) if self.record else nullcontext([]) as forwards:
            yield
        self.routes = [torch.cat(layer, dim=1) for layer in zip(*forwards, strict=True)]

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
        self.captured_routes = self.routes
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


def chunks(config: Any, tokens: int) -> list[tuple[int, int]]:
    """Where parts of so many new tokens begin and end; each is short enough for absorbed attention."""
    size = next(n for n in range(tokens, 0, -1) if n == 1 or absorption_pays(config, n))
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def can_capture(model: nn.Module) -> bool:
    """Whether the whole model is on one GPU, not shared with other processes, and its routing is neither recorded from
    outside nor replayed."""
    placements = {(parameter.device, type(parameter)) for parameter in model.parameters()}
    watched = any(getattr(m, "recordings", ()) or getattr(m, "replayed_routes", None) for m in model.modules())
    shared = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    return not (watched or shared) and len(placements) == 1 and next(iter(placements))[0].type == "cuda"
