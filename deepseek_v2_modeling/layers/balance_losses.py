"""Balance losses (paper eq. 23-31) and expert load, from the routers' logits and chosen experts.

E routed experts, K experts a token, D groups ("devices"), M groups a token may use, N tokens.

Two deliberate differences from the official code: padding is not counted, and each packed document is a sequence of its
own. For batches without padding and packing the numbers are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..configuration import DeepseekV2Config
from .routing import expert_shares

COEFFICIENTS = {
    "expert": "aux_loss_alpha",
    "device": "device_aux_loss_alpha",
    "communication": "comm_aux_loss_alpha",
}


@dataclass
class RouterOutput:
    """The result of one MoE layer's router: logits [N, E] float32, chosen experts [N, K]."""

    logits: torch.Tensor
    experts: torch.Tensor


@dataclass
class BalanceLedger:
    """The values that `collect_balance` gathers.

    losses: one scalar with gradient per training forward, summed over layers and weighted by the coefficients.
    parts: the detached sum of each kind of loss over all forwards.
    expert_counts: [MoE layers, E] tokens routed to each expert, over all forwards; None before the first.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    expert_counts: torch.Tensor | None = None

    def add(self, parts: dict[str, torch.Tensor], counts: torch.Tensor) -> None:
        if parts:
            self.losses.append(torch.stack(list(parts.values())).sum())
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0) + value.detach()
        self.expert_counts = counts if self.expert_counts is None else self.expert_counts + counts


@contextmanager
def collect_balance(model: nn.Module) -> Iterator[BalanceLedger]:
    """Context manager in which every training forward of `model` with gradients adds its balance losses to the ledger.

    `DeepseekV2ForCausalLM.forward` then leaves them out of its `loss`, and the owner of the ledger has to add them.
    This is for trainers that bypass or replace the forward (TRL) and so lose losses that it adds.

    Raises:
        ValueError: `model` contains no DeepSeek-V2 model, or a ledger is already open on it.
    """
    backbones: list[Any] = [m for m in model.modules() if getattr(m, "keeps_balance", False)]
    if not backbones:
        raise ValueError(f"{type(model).__name__} holds no DeepseekV2Model")
    if any(b.ledger is not None for b in backbones):
        raise ValueError("a balance ledger is open on this model already")
    ledger = BalanceLedger()
    for backbone in backbones:
        backbone.ledger = ledger
    try:
        yield ledger
    finally:
        for backbone in backbones:
            backbone.ledger = None


def sequence_ids(
    shape: tuple[int, int], mask: torch.Tensor | None, document_ids: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(sequence number [N], 1.0 for real tokens [N], upper bound on the number of sequences) for a batch of [B, T]
    tokens.

    A sequence is a row, or a packed document in a row (document_ids [B, T], counted from 0 in each row).
    """
    rows, length = shape
    sequence = torch.arange(rows, device=device).unsqueeze(1).expand(rows, length)
    limit = rows
    if document_ids is not None:
        sequence, limit = sequence * length + document_ids, rows * length
    real = torch.ones(rows, length, device=device) if mask is None else mask.to(torch.float32)
    return sequence.reshape(-1), real.reshape(-1), limit


def _mean_by(values: torch.Tensor, sequence: torch.Tensor, real: torch.Tensor, limit: int) -> torch.Tensor:
    """The mean of values [N, X] over the real tokens of each sequence: [limit, X], zero for sequences without any."""
    sums = values.new_zeros(limit, values.shape[-1]).index_add(0, sequence, values * real.unsqueeze(-1))
    tokens = real.new_zeros(limit).index_add(0, sequence, real)
    return sums / tokens.clamp(min=1).unsqueeze(-1)


def layer_losses(
    config: DeepseekV2Config,
    router: RouterOutput,
    sequence: torch.Tensor,
    real: torch.Tensor,
    limit: int,
) -> dict[str, torch.Tensor]:
    """The balance losses of one layer, weighted by their coefficients; losses with coefficient 0 are left out.

    f has no gradient; P is the mean of the scores of all experts, normalised to sum to 1, before groups are masked.
    """
    coefficients = {k: getattr(config, name) for k, name in COEFFICIENTS.items() if getattr(config, name)}
    if not coefficients:
        return {}
    if not config.seq_aux:
        sequence, limit = torch.zeros_like(sequence), 1
    experts, top_k = router.logits.shape[-1], router.experts.shape[-1]
    chosen = torch.zeros_like(router.logits).scatter_(1, router.experts, 1.0)  # [N, E], no gradient
    share = _mean_by(chosen, sequence, real, limit)  # [sequences, E], sums to K
    f = share * (experts / top_k)  # eq. 24
    p = _mean_by(expert_shares(config, router.logits), sequence, real, limit)  # eq. 25
    weight = real.new_zeros(limit).index_add(0, sequence, real).clamp(max=1)  # 1 for sequences that exist
    weight = weight / weight.sum().clamp(min=1)

    groups = config.n_group or 1
    p_group = p.unflatten(-1, (groups, -1)).sum(-1)
    losses = {}
    if "expert" in coefficients:
        losses["expert"] = (f * p).sum(-1)  # eq. 23
    if "device" in coefficients:
        losses["device"] = (f.unflatten(-1, (groups, -1)).mean(-1) * p_group).sum(-1)  # eq. 26-28
    if "communication" in coefficients:
        sent = chosen.unflatten(-1, (groups, -1)).amax(-1)  # [N, D]: whether the token is sent to the group
        f_group = _mean_by(sent, sequence, real, limit) * (groups / (config.topk_group or groups))  # eq. 30
        losses["communication"] = (f_group * p_group).sum(-1)  # eq. 29, 31
    return {name: coefficients[name] * (value * weight).sum() for name, value in losses.items()}


def balance_losses(
    config: DeepseekV2Config,
    routers: list[RouterOutput],
    shape: tuple[int, int],
    mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The losses summed over all MoE layers, by kind (see `COEFFICIENTS`); empty if all coefficients are 0.

    shape is (B, T); mask [B, T] is 1 on real tokens; document_ids [B, T] numbers packed documents from 0 in each row.
    """
    if not routers or not any(getattr(config, name) for name in COEFFICIENTS.values()):
        return {}
    sequences = sequence_ids(shape, mask, document_ids, routers[0].logits.device)
    layers = [layer_losses(config, router, *sequences) for router in routers]
    return {name: torch.stack([layer[name] for layer in layers]).sum() for name in layers[0]}


def expert_counts(routers: list[RouterOutput], mask: torch.Tensor | None) -> torch.Tensor:
    """[MoE layers, E] int64: the number of real tokens routed to each expert."""
    counts = []
    for router in routers:
        weight = torch.ones_like(router.experts) if mask is None else mask.reshape(-1, 1).expand_as(router.experts)
        zero = torch.zeros(router.logits.shape[-1], dtype=torch.int64, device=router.logits.device)
        counts.append(zero.index_add(0, router.experts.reshape(-1), weight.reshape(-1).to(torch.int64)))
    return torch.stack(counts)
