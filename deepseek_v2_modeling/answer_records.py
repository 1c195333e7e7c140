"""What sampling knew about each token of an answer: its log-probability, and the experts that read it.

L MoE layers, K experts a token.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .routing_replay import Routes, record_routing


@dataclass
class AnswerRecord:
    """By answer, in the order of the prompts.

    logps: of each token, by the distribution that it was sampled from; NaN where it was not sampled. routes: of each
    token but the last, which no forward reads, the experts, [L, K] int16. prompts: whether to record those of the
    prompts, too. prompt_routes: of a prompt's tokens [P, L, K] int16, one tensor for all answers to it; none where they
    are not recorded.
    """

    prompts: bool = False
    logps: list[list[float]] = field(default_factory=list)
    routes: list[list[torch.Tensor]] = field(default_factory=list)
    prompt_routes: list[torch.Tensor | None] = field(default_factory=list)


_open: ContextVar[AnswerRecord | None] = ContextVar("answer_record", default=None)


@contextmanager
def record_answers(prompts: bool = False) -> Iterator[AnswerRecord]:
    """While it is open, what `generate_answers` samples is recorded, of several calls one after the other.

    prompts: whether the experts of the prompts' tokens are recorded, too.
    """
    record = AnswerRecord(prompts)
    token = _open.set(record)
    try:
        yield record
    finally:
        _open.reset(token)


def unpadded(routes: Routes, lengths: Sequence[int]) -> list[torch.Tensor]:
    """The recording of a forward over rows padded on the left -> the experts of each one's tokens, [T, L, K] int16;
    none if nothing was recorded."""
    if not routes or not routes[-1]:
        return []
    device = routes[-1][0].device
    experts = torch.stack([layer.to(device, torch.int16) for layer in routes[-1]], dim=2).cpu()  # [rows, T, L, K]
    return [row[len(row) - length :].clone() for row, length in zip(experts, lengths, strict=True)]


class Recorder:
    """Fills the open record, if there is one, for one call of `generate_answers`."""

    def __init__(self, answers: int):
        self.record = _open.get()
        if self.record is not None:
            self.first = len(self.record.logps)
            self.record.logps += [[] for _ in range(answers)]
            self.record.routes += [[] for _ in range(answers)]
            self.record.prompt_routes += [None] * answers

    @property
    def records(self) -> bool:
        return self.record is not None

    def prefill(self, model: nn.Module) -> Any:
        """Around a forward over prompts: a context manager that gives the recording of it, for `unpadded`."""
        return record_routing(model) if self.record is not None and self.record.prompts else nullcontext([])

    def entered(self, answers: Sequence[int], routes: Sequence[torch.Tensor]) -> None:
        """These answers were started; routes: of their prompts, if they are recorded."""
        if self.record is not None and routes:
            for answer, of_prompt in zip(answers, routes, strict=True):
                self.record.prompt_routes[self.first + answer] = of_prompt

    def read(self, answers: Sequence[int], live: Sequence[bool], layers: Sequence[torch.Tensor]) -> None:
        """A decode step was made, on one more token of the answer in each slot, as far as they are live. layers: the
        experts [B, 1, K] of each MoE layer."""
        if self.record is None or not layers:
            return
        device = layers[0].device
        experts = torch.stack([chosen[:, -1].to(device, torch.int16) for chosen in layers], dim=1).cpu()
        for answer, is_live, route in zip(answers, live, experts, strict=True):
            if is_live:
                self.record.routes[self.first + answer].append(route)

    def read_turns(self, answers: Sequence[int], new: Sequence[Sequence[int]], layers: Sequence[torch.Tensor]) -> None:
        """Several new tokens of these answers were read, padded on the left: the last one of a turn, then those that
        follow it, which were not sampled. layers: their experts, [answers, T, K] of each MoE layer."""
        if self.record is None:
            return
        for answer, tokens in zip(answers, new, strict=True):
            self.record.logps[self.first + answer] += [math.nan] * (len(tokens) - 1)
        for answer, experts in zip(answers, unpadded([list(layers)], list(map(len, new))), strict=False):
            self.record.routes[self.first + answer] += list(experts)

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
