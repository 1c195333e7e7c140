"""The routed experts in float32 by oneDNN on a CPU, without gradients: one expert after the other, from its tokens to
their outputs, so that what is between the products stays in the CPU's cache.

N tokens, K experts a token, E experts, M rows of one expert, D hidden, F expert width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .float32_products import STEADY, by_onednn, onednn_product
from .grouped_products import ActiveAdapter, place_slots

Adapters = Mapping[str, Sequence[ActiveAdapter]]


def is_worth_it(x_ND: torch.Tensor, experts_NK: torch.Tensor, num_experts: int) -> bool:
    """Whether oneDNN is the faster one, and experts have at least as many rows as groups are filled up to."""
    return by_onednn(x_ND) and experts_NK.numel() >= STEADY * num_experts


def one_after_another(
    x_ND: torch.Tensor,
    weights_NK: torch.Tensor,
    experts_NK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    adapters: Adapters,
    activation: nn.Module,
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, [N, D]; all are float32. Groups are filled up with rows that are
    not used, so that oneDNN meets few shapes."""
    count = len(down_EDF)
    slots, groups = place_slots(experts_NK, count, STEADY)
    tokens, weights, out = slots.token_P, slots.weights_P(weights_NK).unsqueeze(1), torch.zeros_like(x_ND)
    real = torch.bincount(experts_NK.flatten(), minlength=count).tolist()
    factors = {name: [(a, a.spread(a.a, count), a.spread(a.b, count)) for a in of] for name, of in adapters.items()}

    def product(name: str, expert: int, x_MI: torch.Tensor, w_EOI: torch.Tensor) -> torch.Tensor:
        y = onednn_product(x_MI, w_EOI[expert])
        for adapter, a, b in factors.get(name, []):
            dropped = adapter.dropped(x_MI)
            y.addmm_((x_MI if dropped is None else dropped) @ a[expert].t(), b[expert].t(), alpha=adapter.scaling)
        return y

    start = 0
    for expert, rows in enumerate(groups.counts):
        if rows:
            x = x_ND.index_select(0, tokens[start : start + rows])
            gate, up = product("gate_up_proj", expert, x, gate_up_E2FD).chunk(2, dim=-1)
            y = product("down_proj", expert, activation(gate).mul_(up), down_EDF)
            used = slice(start, start + real[expert])
            out.index_add_(0, tokens[used], y[: real[expert]].mul_(weights[used]))
        start += rows
    return out
