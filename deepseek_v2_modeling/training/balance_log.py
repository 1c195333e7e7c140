"""Accumulates balance losses and expert counts between two logs of a run, over all processes."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from ..layers.balance_losses import BalanceLedger

SHARE_DIGITS = 5


class BalanceLog:
    """Sums of the ledgers of all training forwards since the last log.

    Logged keys: `balance/expert|device|communication` and their sum `balance/total` (part of `loss`, in the same unit);
    `task_loss` (`loss` without it); the expert load `expert_load/layer_N/max_over_mean` and `.../dead` (experts without
    a token), with the worst layer as `expert_load/max_over_mean` and the sum as `expert_load/dead`.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.updates = 0.0
        self.parts: dict[str, torch.Tensor] = {}
        self.counts: torch.Tensor | None = None
        self.shares: dict[str, list[float]] = {}

    def add(self, ledger: BalanceLedger, micro_batches: int) -> None:
        """Add the ledger of one micro-batch of an update that has `micro_batches` of them."""
        if ledger.expert_counts is None:
            return
        self.updates += 1 / micro_batches
        forwards = max(1, len(ledger.losses))
        for name, value in ledger.parts.items():
            self.parts[name] = self.parts.get(name, 0) + value / (micro_batches * forwards)
        counts = ledger.expert_counts
        self.counts = counts if self.counts is None else self.counts + counts

    def take(self, loss: float, config: PreTrainedConfig) -> dict[str, float]:
        """The values since the last call, averaged over updates and processes; resets them."""
        if self.counts is None:
            return {}
        parts = {name: self._mean(value) / self.updates for name, value in sorted(self.parts.items())}
        counts = self.accelerator.reduce(self.counts, reduction="sum")
        layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
        logs = load_metrics(counts, layers)
        self.shares = {
            f"expert_load/layer_{layer}/share": [round(share, SHARE_DIGITS) for share in row.tolist()]
            for layer, row in zip(layers, expert_shares(counts), strict=True)
        }
        if parts:
            balance = sum(parts.values())
            logs |= {"task_loss": loss - balance, "balance/total": balance}
            logs |= {f"balance/{name}": value for name, value in parts.items()}
        self.updates, self.parts, self.counts = 0.0, {}, None
        return logs

    def take_shares(self) -> dict[str, list[float]]:
        """Each expert's fraction of its layer's tokens at the last `take`; returned only once."""
        shares, self.shares = self.shares, {}
        return shares

    def _mean(self, value: torch.Tensor) -> float:
        return self.accelerator.reduce(value, reduction="mean").item()


def expert_shares(counts: torch.Tensor) -> torch.Tensor:
    """counts [layers, E] -> each expert's fraction of its layer's tokens, float64."""
    return counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)


def load_metrics(counts: torch.Tensor, layers: list[int]) -> dict[str, float]:
    """Load metrics (see `BalanceLog`) from counts [MoE layers, E]; layers: their indices in the model."""
    ratios = (expert_shares(counts).amax(-1) * counts.shape[-1]).tolist()
    dead = (counts == 0).sum(-1).tolist()
    logs: dict[str, float] = {"expert_load/max_over_mean": max(ratios), "expert_load/dead": sum(dead)}
    for layer, max_over_mean, dead_experts in zip(layers, ratios, dead, strict=True):
        logs[f"expert_load/layer_{layer}/max_over_mean"] = max_over_mean
        logs[f"expert_load/layer_{layer}/dead"] = dead_experts
    return logs
