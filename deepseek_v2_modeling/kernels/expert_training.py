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

from .grouped_products import Groups, LowRank, Share, Slots, looped_gradient, looped_product, shares_of


@dataclass(frozen=True)
class Job:
    """What the function takes besides tensors. told: for the first and the second product, (scaling, places) of each
    adapter, whose factors a [E, r, I] and b [E, O, r] follow in that order."""

    slots: Slots
    counts: tuple[int, ...]
    activation: nn.Module
    told: tuple[tuple[tuple[float, Sequence[int]], ...], ...]

    def shares(self, factors: Sequence[torch.Tensor]) -> tuple[list[Share], list[Share]]:
        """Of the first and of the second product."""
        first, second = self.told
        tensors = [t for i in range(0, len(factors), 2) for t in (None, *factors[i : i + 2])]
        split = 3 * len(first)
        return shares_of(first, tensors[:split]), shares_of(second, tensors[split:])


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        x_ND: torch.Tensor,
        weights_NK: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        first, second = job.shares(factors)
        with torch.autocast("cpu", enabled=False):
            x_PD = x_ND.index_select(0, job.slots.token_P)
            hidden_P2F = looped_product(job.counts, x_PD, gate_up, first)
            gate, up = hidden_P2F.chunk(2, dim=-1)
            y_PD = looped_product(job.counts, job.activation(gate).mul_(up), down, second)
        ctx.save_for_backward(x_ND, weights_NK, gate_up, down, hidden_P2F, *factors)
        ctx.job = job
        places_NK = job.slots.place_S.view(weights_NK.shape)
        return F.embedding_bag(places_NK, y_PD.float(), per_sample_weights=weights_NK, mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x_ND, weights_NK, gate_up, down, hidden_P2F, *factors = ctx.saved_tensors
        job: Job = ctx.job
        slots, (first, second) = job.slots, job.shares(factors)
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
            d_weighted, d_down, more = looped_gradient(
                job.counts, g_PD, hidden * w_P1, down, second, (True, needs_w[1])
            )
            assert d_weighted is not None
            dw_P = torch.einsum("pf,pf->p", d_weighted, hidden).float()
            d_hidden = d_weighted.mul_(w_P1)
            d_first = torch.empty_like(hidden_P2F)
            d_gate, d_up = d_first.chunk(2, dim=-1)
            torch.mul(d_hidden, activated.detach(), out=d_up)
            d_gate.copy_(torch.autograd.grad(activated, leaf, d_hidden.mul_(up))[0])
            dx_PD, d_gate_up, made = looped_gradient(job.counts, d_first, x_PD, gate_up, first, (needs_x, needs_w[0]))
        dx_ND = None
        if dx_PD is not None:
            dx_ND = dx_PD.index_select(0, slots.place_S).unflatten(0, (-1, slots.top_k)).sum(1)
        dw_NK = dw_P.index_select(0, slots.place_S).view(weights_NK.shape)
        of_factors = [grad for i, grad in enumerate([*made, *more]) if i % 3]  # there is no z
        return None, dx_ND, dw_NK, d_gate_up, d_down, *of_factors


def train_experts(
    experts: Any,
    adapters: dict[str, list[LowRank]],
    x_ND: torch.Tensor,
    weights_NK: torch.Tensor,
    slots: Slots,
    groups: Groups,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, [N, D] float32. x is in the dtype of the products; adapters without
    dropout."""
    lists = [adapters.get(name, []) for name in ("gate_up_proj", "down_proj")]
    told = tuple(tuple((a.scaling, a.places(experts.num_experts)) for a in found) for found in lists)
    job = Job(slots, groups.counts, experts.act_fn, told)
    factors = [factor for found in lists for adapter in found for factor in (adapter.a, adapter.b)]
    return _Experts.apply(job, x_ND, weights_NK, experts.gate_up_proj, experts.down_proj, *factors)
