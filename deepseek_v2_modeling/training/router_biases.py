"""Auxiliary-loss-free load balancing (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.router_biases import router_biases
from ..configuration import SPEED
from ..layers.balance_losses import BalanceLedger


class RouterBiases(TrainerCallback):
    """After each update adds `u * sign(mean load - load)` to the bias of each expert, with u the config's
    `bias_update_speed` and an expert's load the number of tokens routed to it, over all micro-batches and processes.

    model: returns the model. skipped: returns the number of updates skipped so far; a skipped one moves no bias.
    """

    def __init__(self, accelerator: Any, model: Callable[[], nn.Module], skipped: Callable[[], int]):
        self.accelerator, self.model, self.skipped = accelerator, model, skipped
        self.counts: torch.Tensor | None = None
        self.skipped_before = 0

    def add(self, ledger: BalanceLedger) -> None:
        """Add the counts of one micro-batch."""
        if ledger.expert_counts is not None:
            self.counts = ledger.expert_counts if self.counts is None else self.counts + ledger.expert_counts

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model, counts, skipped = self.model(), self.counts, self.skipped() != self.skipped_before
        self.counts, self.skipped_before = None, self.skipped()
        speed = getattr(model.config, SPEED, 0)
        if counts is None or not speed or skipped:
            return
        load = self.accelerator.reduce(counts, reduction="sum").double()
        biases = router_biases(model).values()
        for bias, towards_mean in zip(biases, (load.mean(-1, keepdim=True) - load).sign(), strict=True):
            bias += speed * towards_mean.to(bias)

    def logs(self) -> dict[str, float]:
        """The speed, and the largest bias (absolute) of all layers; empty without updates."""
        model = self.model()
        if not (speed := getattr(model.config, SPEED, 0)):
            return {}
        largest = [bias.abs().max().item() for bias in router_biases(model).values()] or [0.0]  # a dense model has none
        return {"router_bias/speed": speed, "router_bias/largest": max(largest)}
