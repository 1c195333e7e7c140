"""The routed experts of a layer in training on a CPU, as one function of its tokens.

Of what lies between the tokens and the outputs only the first product's result is kept for the gradients. The rest is
made again (cheap) or is not needed: with the gate weight on the hidden side, y = (w h) W^T, the gradient of w h gives
those of both w and h without y.

N tokens, K experts a token, P rows sorted by expert, D hidden, F expert width, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .grouped_products import ActiveAdapter, Groups, Slots, looped_gradient, looped_product
from .low_rank import Share, flattened, shares_of


@dataclass(frozen=True)
class Job:
    """What the function takes besides tensors. first, second: scalings of the adapters of the first and of the second
    product, whose `flattened` factors follow in that order."""

    slots: Slots
    groups: Groups
    activation: nn.Module
    first: Sequence[float]
    second: Sequence[float]

    def shares(self, tensors: Sequence[torch.Tensor | None]) -> tuple[list[Share], list[Share]]:
        """Of the first and of the second product."""
        shares = shares_of([*self.first, *self.second], tensors)
        return shares[: len(self.first)], shares[len(self.first) :]


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
        first, second = job.shares(tensors)
        with torch.autocast("cpu", enabled=False):
            x_PD = x_ND.index_select(0, job.slots.token_P)
            hidden_P2F = looped_product(job.groups, x_PD, gate_up, first)
            gate, up = hidden_P2F.chunk(2, dim=-1)
            y_PD = looped_product(job.groups, job.activation(gate).mul_(up), down, second)
        ctx.save_for_backward(x_ND, weights_NK, gate_up, down, hidden_P2F, *tensors)
        ctx.job = job
        places_NK = job.slots.place_S.view(weights_NK.shape)
        return F.embedding_bag(places_NK, y_PD.float(), per_sample_weights=weights_NK, mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x_ND, weights_NK, gate_up, down, hidden_P2F, *tensors = ctx.saved_tensors
        job: Job = ctx.job
        slots, (first, second) = job.slots, job.shares(tensors)
        needs_x, _, *needs_w = ctx.needs_input_grad[1:5]
        x_PD, g_PD = (t.to(x_ND.dtype).index_select(0, slots.token_P) for t in (x_ND, grads[0]))
        w_P = weights_NK.reshape(-1).index_select(0, slots.slot_P.clamp(min=0)) * (slots.slot_P >= 0)
        w_P1 = w_P.to(x_ND.dtype).unsqueeze(1)
        gate, up = hidden_P2F.chunk(2, dim=-1)
        with torch.autocast("cpu", enabled=False):
            with torch.enable_grad():
                leaf = gate.detach().requires_grad_()
                activated = job.activation(leaf)
            hidden = activated.detach() * up
            d_weighted, d_down, of_second = looped_gradient(
                job.groups, g_PD, hidden * w_P1, down, second, (True, needs_w[1])
            )
            assert d_weighted is not None
            dw_P = torch.einsum("pf,pf->p", d_weighted, hidden).float()
            d_hidden = d_weighted.mul_(w_P1)
            d_first = torch.empty_like(hidden_P2F)
            d_gate, d_up = d_first.chunk(2, dim=-1)
            torch.mul(d_hidden, activated.detach(), out=d_up)
            d_gate.copy_(torch.autograd.grad(activated, leaf, d_hidden.mul_(up))[0])
            needs = (needs_x, needs_w[0])
            dx_PD, d_gate_up, of_first = looped_gradient(job.groups, d_first, x_PD, gate_up, first, needs)
        dx_ND = None
        if dx_PD is not None:
            dx_ND = dx_PD.index_select(0, slots.place_S).unflatten(0, (-1, slots.top_k)).sum(1)
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
    """Weighted sum of the chosen experts' outputs, [N, D] float32. x is in the dtype of the products; adapters without
    dropout."""
    first, second = adapters.get("gate_up_proj", []), adapters.get("down_proj", [])
    job = Job(slots, groups, experts.act_fn, *([adapter.scaling for adapter in side] for side in (first, second)))
    factors = (adapter.factors(experts.num_experts, x_ND) for adapter in (*first, *second))
    return _Experts.apply(job, x_ND, weights_NK, experts.gate_up_proj, experts.down_proj, *flattened(factors))
