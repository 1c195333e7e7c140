"""What sampling knew about each token of an answer: its log-probability, and the experts that read it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn

from .decode_steps import can_capture
from .routing_replay import Routes, record_routing


@dataclass
class AnswerRecord:
    """By answer, in the order of the prompts.

    logps: of each token, by the distribution that it was sampled from; NaN where it was not sampled. routes: of each
    token but the last, which no forward reads, the experts of each MoE layer, [MoE layers, K] int16; none where decode
    steps are captured as a CUDA graph.
    """

    logps: list[list[float]] = field(default_factory=list)
    routes: list[list[torch.Tensor]] = field(default_factory=list)


_open: ContextVar[AnswerRecord | None] = ContextVar("answer_record", default=None)


@contextmanager
def record_answers() -> Iterator[AnswerRecord]:
    """While it is open, what `generate_answers` samples is recorded, of several calls one after the other."""
    record = AnswerRecord()
    token = _open.set(record)
    try:
        yield record
    finally:
        _open.reset(token)


class Recorder:
    """Fills the open record, if there is one, for one call of `generate_answers`."""

    def __init__(self, model: nn.Module, answers: int):
        self.record = _open.get()
        self.routes: Routes | None = None
        self.stack = ExitStack()
        if self.record is None:
            return
        self.first = len(self.record.logps)
        self.record.logps += [[] for _ in range(answers)]
        if not can_capture(model):
            self.record.routes += [[] for _ in range(answers)]
            self.routes = self.stack.enter_context(record_routing(model))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def read_prompts(self) -> None:
        """Prompts were read; the routes of their tokens are not kept."""
        if self.routes is not None:
            self.routes.clear()

    def read(self, answers: Sequence[int], live: Sequence[bool]) -> None:
        """A decode step was made, on one more token of the answer in each slot, as far as they are live."""
        if self.record is None or self.routes is None:
            return
        layers = self.routes[-1]
        self.routes.clear()
        if layers:
            experts = torch.stack([chosen[:, -1].to(layers[0].device, torch.int16) for chosen in layers], dim=1).cpu()
            for answer, is_live, route in zip(answers, live, experts, strict=True):
                if is_live:
                    self.record.routes[self.first + answer].append(route)

    def read_turns(self, answers: Sequence[int], new: Sequence[Sequence[int]]) -> None:
        """Several new tokens of these answers were read, padded on the left: the last one of a turn, then those that
        follow it, which were not sampled."""
        if self.record is None:
            return
        for answer, tokens in zip(answers, new, strict=True):
            self.record.logps[self.first + answer] += [math.nan] * (len(tokens) - 1)
        if self.routes is None:
            return
        forwards = [[chosen.to("cpu", torch.int16) for chosen in layers] for layers in self.routes if layers]
        parts = [torch.stack(layers, dim=2) for layers in forwards]
        self.routes.clear()
        if parts:
            for answer, tokens, experts in zip(answers, new, torch.cat(parts, dim=1), strict=True):
                self.record.routes[self.first + answer] += list(experts[-len(tokens) :])

    def chosen(
        self,
        answers: Sequence[int],
        live: Sequence[bool],
        logits: torch.Tensor,
        temperature: float,
        tokens: torch.Tensor,
    ) -> None:
        """tokens [B] were chosen from logits [B, V] for these answers."""
        if self.record is None:
            return
        scaled = logits.float() / (temperature or 1.0)
        logps = scaled.gather(1, tokens.unsqueeze(1)).squeeze(1) - scaled.logsumexp(-1)
        for answer, is_live, logp in zip(answers, live, logps.tolist(), strict=True):
            if is_live:
                self.record.logps[self.first + answer].append(logp)
