"""Measures how much a data set uses each routed expert (ESFT, arXiv 2407.01906).

    gate   Average Gate Score g_i: the mean over samples of the mean over a sample's tokens of the expert's gate weight
           (0 where it was not chosen)
    token  Token Selection Ratio r_i: the same, with 1/K for every token that was routed to the expert

A sample is a training row. The paper's samples have equal lengths; rows do not, and each row counts the same. Scores
are normalised to sum to 1 in each layer, so that for both kinds a threshold is a fraction of the total.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ModelError
from ..inference import by_length, evaluation_mode, pad_batch
from ..layers.routing import expert_scores, expert_weights
from ..routing_replay import record_routing
from .choice import moe_layers

Score = Literal["gate", "token"]
THRESHOLDS: dict[Score, float] = {"gate": 0.1, "token": 0.2}  # the paper's values


@dataclass(frozen=True)
class ExpertScores:
    """shares: kind of score -> [MoE layers, E] float64, summing to 1 in each layer. layers: indices of the MoE layers.
    rows, tokens: numbers of rows and tokens measured."""

    layers: list[int]
    shares: dict[Score, torch.Tensor]
    rows: int
    tokens: int


@torch.no_grad()
def score_experts(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
) -> ExpertScores:
    """Run sequences of token ids through the model in evaluation mode, and score every routed expert.

    Padding is not counted. progress: called with the number of tokens of each batch.

    Raises:
        ModelError: the model has no routed experts, or the gate weights are not finite.
    """
    backbone: Any = model.get_decoder()  # pyright: ignore[reportCallIssue] - also of a PeftModel
    config, device = backbone.config, next(model.parameters()).device
    if not (layers := moe_layers(config)):
        raise ModelError(f"{config.name_or_path or 'the model'} has no routed experts: all its layers are dense")
    sums = torch.zeros(2, len(layers), config.n_routed_experts, dtype=torch.float64, device=device)
    with evaluation_mode(model):
        for batch in by_length(sequences, batch_size):
            ids, mask = (t.to(device) for t in pad_batch([sequences[i] for i in batch], pad_token_id, left=False))
            with record_routing(model) as routes:
                out = backbone(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
            share_N1 = (mask.double() / mask.sum(1, keepdim=True)).view(-1, 1)  # 1/L of the token's row, 0 for padding
            for layer, (logits, chosen) in enumerate(zip(out.router_logits, routes[0], strict=True)):
                experts_NK = chosen.flatten(0, 1)
                weights = expert_weights(config, expert_scores(config, logits), experts_NK)
                _add(sums[0, layer], experts_NK, weights * share_N1)
                _add(sums[1, layer], experts_NK, (share_N1 / experts_NK.shape[1]).expand_as(weights))
            progress(int(mask.sum()))
    if not sums.isfinite().all():
        raise ModelError("the gate weights are not all finite: the model is broken, or too large for its dtype")
    gate, token = (sums / sums.sum(-1, keepdim=True)).cpu()
    return ExpertScores(layers, {"gate": gate, "token": token}, len(sequences), sum(map(len, sequences)))


def _add(sums_E: torch.Tensor, experts_NK: torch.Tensor, values_NK: torch.Tensor) -> None:
    sums_E.index_add_(0, experts_NK.flatten(), values_NK.flatten())
