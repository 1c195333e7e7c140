"""The routed experts for few rows each on a CPU, without gradients: every expert's rows padded to one number, so that
each weight takes one batched product.

When a batch of answers is decoded, most experts have a few rows. A product per expert costs more than its arithmetic
then and does not read the weights at the memory's rate (docs/speed.md).

N tokens, K experts a token, E experts, M rows of each expert, D hidden, F expert width.
"""

import torch
from torch import nn

from .grouped_products import weighted_slots

BUSIEST = 16  # rows; with more, padding costs more arithmetic than reading the weights takes
SMALL = 2**19  # weights of one expert's product; larger ones are read at the memory's rate by a product each as well


def rows_per_expert(experts_NK: torch.Tensor, num_experts: int) -> int:
    """M: the rows of the busiest expert, rounded up to a power of 2, so that there are few shapes."""
    busiest = int(torch.bincount(experts_NK.flatten(), minlength=num_experts).max())
    return 1 << (busiest - 1).bit_length()


def is_worth_padding(experts_NK: torch.Tensor, w_EOI: torch.Tensor) -> bool:
    """Whether experts are small and have at least one row on average, since the weights of all are read, and none has
    too many rows. w: the largest of their weights."""
    slots, experts = experts_NK.numel(), len(w_EOI)
    if w_EOI[0].numel() > SMALL or not experts <= slots <= BUSIEST * experts:
        return False
    return rows_per_expert(experts_NK, experts) <= BUSIEST


def place_evenly(experts_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the token of each row [E, M], 0 for padding; the row of each slot [N, K], counted through all experts)."""
    flat, rows = experts_NK.flatten(), rows_per_expert(experts_NK, num_experts)
    order_S = flat.argsort(stable=True)
    expert_S = flat[order_S]
    starts_E = torch.searchsorted(expert_S, torch.arange(num_experts))
    place_S = expert_S * rows + torch.arange(len(flat)) - starts_E[expert_S]
    token_P = flat.new_zeros(num_experts * rows)
    token_P[place_S] = order_S // experts_NK.shape[1]
    places = torch.empty_like(place_S)
    places[order_S] = place_S
    return token_P.view(num_experts, rows), places.view(experts_NK.shape)


def batched_product(x_EMI: torch.Tensor, w_EOI: torch.Tensor) -> torch.Tensor:
    """x @ w^T for each expert: [E, M, O]. In float32 (MKL) the weights are the left operand, in low precision (oneDNN)
    the right one, which is faster."""
    if x_EMI.dtype == torch.float32:
        return torch.bmm(w_EOI, x_EMI.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(x_EMI, w_EOI.transpose(1, 2))


def few_rows_each(
    x_ND: torch.Tensor,
    weights_NK: torch.Tensor,
    experts_NK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    activation: nn.Module,
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, [N, D] float32; x is in the dtype of the weights."""
    token_EM, places_NK = place_evenly(experts_NK, len(down_EDF))
    with torch.autocast("cpu", enabled=False):
        gate_EMF, up_EMF = batched_product(x_ND[token_EM], gate_up_E2FD).chunk(2, dim=-1)
        y_EMD = batched_product(activation(gate_EMF) * up_EMF, down_EDF)
    return weighted_slots(y_EMD.flatten(0, 1), places_NK, weights_NK)
