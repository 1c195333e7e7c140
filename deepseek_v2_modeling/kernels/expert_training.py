"""The routed experts of a layer in training, as one autograd function.

Of the intermediate activations only the result of the first product (gate and up projections) is saved for the backward
pass. The others are cheap to recompute or not needed: with the gate weight applied before the down projection,
y = (w h) W^T, the gradient with respect to w h yields those of w and h without y.

N tokens, K experts a token, P rows sorted by expert, D hidden, F expert width, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .fused import fused
from .grouped_products import ActiveAdapter, Groups, Slots, summed_slots, weighted_slots
from .low_rank import Share, flattened, shares_of
from .quantized_weights import Storage, Weight, held, opened
from .row_blocks import IN_CACHE, row_blocks


@dataclass(frozen=True)
class Job:
    """The function's arguments that are not tensors. storages: how the two weights are stored. first, second: the
    scalings of the adapters on the first product (gate_up_proj) and on the second (down_proj); their `flattened`
    factors are passed in that order."""

    slots: Slots
    groups: Groups
    activation: nn.Module
    storages: tuple[Storage | None, Storage | None]
    first: Sequence[float]
    second: Sequence[float]

    def weights(self, gate_up: torch.Tensor, down: torch.Tensor) -> tuple[Weight, Weight]:
        """The two weights, from the tensors that hold them."""
        return opened(gate_up, self.storages[0]), opened(down, self.storages[1])

    def shares(self, tensors: Sequence[torch.Tensor | None]) -> tuple[list[Share], list[Share]]:
        """The adapters of the first and of the second product."""
        shares = shares_of([*self.first, *self.second], tensors)
        return shares[: len(self.first)], shares[len(self.first) :]


@fused
def gated_halves(hidden_P2F: torch.Tensor, activation: nn.Module, weights_P1: torch.Tensor | None) -> torch.Tensor:
    """[P, F]: activation(gate) * up, where hidden holds gate and up side by side; times each row's weight if given."""
    gate, up = hidden_P2F.chunk(2, dim=-1)
    gated = activation(gate) * up
    return gated if weights_P1 is None else gated * weights_P1


@fused
def gated_halves_gradient(
    hidden_P2F: torch.Tensor, activation: nn.Module, weights_P1: torch.Tensor, g_PF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `gated_halves` with respect to hidden [P, 2F] and to the weights [P] (float32)."""
    gate, up = hidden_P2F.chunk(2, dim=-1)
    vjp: Any = torch.func.vjp
    activated, pull = vjp(activation, gate)
    d_weights_P = (g_PF * (activated * up)).sum(-1, dtype=torch.float32)
    d_gated = g_PF * weights_P1
    d_halves = torch.empty_like(hidden_P2F)
    d_gate, d_up = d_halves.chunk(2, dim=-1)
    d_gate.copy_(pull(d_gated * up)[0])
    d_up.copy_(d_gated * activated)
    return d_halves, d_weights_P


def pulled_back(activation: nn.Module, gate: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The gradient of the activation's input."""
    if type(activation) is nn.SiLU:
        return torch.ops.aten.silu_backward(g, gate)
    vjp: Any = torch.func.vjp
    return vjp(activation, gate)[1](g)[0]


def gate_rows(hidden_P2F: torch.Tensor, activation: nn.Module, weights_P1: torch.Tensor | None) -> torch.Tensor:
    """`gated_halves`; on a CPU some rows at a time."""
    if hidden_P2F.device.type != "cpu":
        return gated_halves(hidden_P2F, activation, weights_P1)
    gate_PF, up_PF = hidden_P2F.chunk(2, dim=-1)
    out_PF = torch.empty_like(gate_PF, memory_format=torch.contiguous_format)
    for rows in row_blocks(len(gate_PF), gate_PF.shape[1], IN_CACHE):
        torch.mul(activation(gate_PF[rows]), up_PF[rows], out=out_PF[rows])
        if weights_P1 is not None:
            out_PF[rows] *= weights_P1[rows]
    return out_PF


def gate_rows_gradient(
    hidden_P2F: torch.Tensor, activation: nn.Module, weights_P1: torch.Tensor, g_PF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_halves_gradient`; on a CPU some rows at a time."""
    if hidden_P2F.device.type != "cpu":
        return gated_halves_gradient(hidden_P2F, activation, weights_P1, g_PF)
    d_halves, d_weights_P = torch.empty_like(hidden_P2F), g_PF.new_empty(len(g_PF), dtype=torch.float32)
    (all_gates, all_ups), (d_gates, d_ups) = (t.chunk(2, dim=-1) for t in (hidden_P2F, d_halves))
    for rows in row_blocks(len(g_PF), g_PF.shape[1], IN_CACHE):
        gate, up, g = all_gates[rows], all_ups[rows], g_PF[rows]
        activated = activation(gate)
        d_weights_P[rows] = (activated * up).mul_(g).sum(-1, dtype=torch.float32)
        d_gated = g * weights_P1[rows]
        torch.mul(d_gated, activated, out=d_ups[rows])
        d_gates[rows] = pulled_back(activation, gate, d_gated.mul_(up))
    return d_halves, d_weights_P


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        x_ND: torch.Tensor,
        weights_NK: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        slots, groups, (first, second) = job.slots, job.groups, job.shares(tensors)
        w_gate_up, w_down = job.weights(gate_up, down)
        with torch.autocast(x_ND.device.type, enabled=False):
            hidden_P2F = groups.product(x_ND.index_select(0, slots.token_P), w_gate_up, first)
            y_PD = groups.product(gate_rows(hidden_P2F, job.activation, None), w_down, second)
        ctx.save_for_backward(x_ND, weights_NK, gate_up, down, hidden_P2F, *tensors)
        ctx.job = job
        return weighted_slots(y_PD, slots.places_NK, weights_NK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x_ND, weights_NK, gate_up, down, hidden_P2F, *tensors = ctx.saved_tensors
        job: Job = ctx.job
        slots, groups, (first, second) = job.slots, job.groups, job.shares(tensors)
        w_gate_up, w_down = job.weights(gate_up, down)
        needs_x, _, *needs_w = ctx.needs_input_grad[1:5]
        x_PD, g_PD = (t.to(x_ND.dtype).index_select(0, slots.token_P) for t in (x_ND, grads[0]))
        weights_P1 = slots.weights_P(weights_NK).to(x_ND.dtype).unsqueeze(1)
        with torch.autocast(x_ND.device.type, enabled=False):
            weighted = gate_rows(hidden_P2F, job.activation, weights_P1)
            d_weighted, d_down, of_second = groups.gradient(g_PD, weighted, w_down, second, (True, needs_w[1]))
            assert d_weighted is not None
            d_halves, dw_P = gate_rows_gradient(hidden_P2F, job.activation, weights_P1, d_weighted)
            needs = (needs_x, needs_w[0])
            dx_PD, d_gate_up, of_first = groups.gradient(d_halves, x_PD, w_gate_up, first, needs)
        dx_ND = None if dx_PD is None else summed_slots(dx_PD, slots.places_NK)
        dw_NK = dw_P.index_select(0, slots.place_S).view(weights_NK.shape)
        return None, dx_ND, dw_NK, d_gate_up, d_down, *flattened([*of_first, *of_second])


def train_experts(
    experts: Any,
    adapters: dict[str, list[ActiveAdapter]],
    x_ND: torch.Tensor,
    weights_NK: torch.Tensor,
    slots: Slots,
    groups: Groups,
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, [N, D] float32. x is in the dtype of the products; the adapters
    have no dropout."""
    first, second = adapters.get("gate_up_proj", []), adapters.get("down_proj", [])
    weights, storages = zip(*(held(experts.weight_of(name)) for name in ("gate_up_proj", "down_proj")), strict=True)
    scalings = ([adapter.scaling for adapter in side] for side in (first, second))
    job = Job(slots, groups, experts.act_fn, storages, *scalings)
    factors = (adapter.factors(experts.num_experts, x_ND) for adapter in (*first, *second))
    return _Experts.apply(job, x_ND, weights_NK, *weights, *flattened(factors))
