"""The feed-forward blocks: the dense block, the router, the routed experts and the MoE block (paper, section 2.2).

B batch, T tokens, N = B*T, D hidden, F expert width, E routed experts, K experts a token, S = N*K slots.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..configuration import CORRECTION_BIAS, DeepseekV2Config
from ..kernels.even_groups import few_rows_each, is_worth_padding
from ..kernels.expert_scoring import is_worth_it, one_after_another
from ..kernels.expert_training import train_experts
from ..kernels.float32_products import Linear, by_onednn, compute_dtype, is_plain
from ..kernels.grouped_products import ActiveAdapter, Groups, combine, dispatch, fills_up, place_slots
from ..kernels.one_token import experts_of_one_token
from ..kernels.quantized_weights import Storage, Weight, opened
from ..kernels.swiglu import gated
from .balance_losses import RouterOutput
from .peft_factors import linear, unwrap
from .routing import choose_experts, expert_scores, expert_weights, replayed_experts

TOKENS = 4096  # tokens to run through the experts at a time
ROWS = 512  # tokens to run through a dense block at a time, where what is between its products then stays in the cache


class DeepseekV2MLP(nn.Module):
    """A dense SwiGLU block; also used for the shared experts, as one block of their total width."""

    def __init__(self, config: DeepseekV2Config, width: int):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, width, bias=False)
        self.up_proj = Linear(config.hidden_size, width, bias=False)
        self.down_proj = Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if by_onednn(x) and x.shape[:-1].numel() > ROWS:
            parts = [self.of_rows(part) for part in x.flatten(0, -2).split(ROWS)]
            return torch.cat(parts).unflatten(0, x.shape[:-1])
        return self.of_rows(x)

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self.down_proj, gated(linear(self.gate_proj, x), linear(self.up_proj, x), self.act_fn))


class DeepseekV2Router(nn.Module):
    """The router's linear layer, which scores all experts in float32 (official).

    With topk_method `noaux_tc` it holds e_score_correction_bias [E] float32, which is added to the scores in the choice
    of experts only. No gradient trains it.
    """

    def __init__(self, config: DeepseekV2Config):
        super().__init__()
        self.config = config
        experts = config.n_routed_experts or 0
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        bias = torch.zeros(experts, dtype=torch.float32) if config.topk_method == "noaux_tc" else None
        self.register_buffer(CORRECTION_BIAS, bias)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """x [N, D] -> logits [N, E] float32."""
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.float(), self.weight.float())


def router_logits(gate: nn.Module, x_ND: torch.Tensor) -> torch.Tensor:
    """Logits [N, E] float32 of a router with or without LoRA."""
    if isinstance(gate, DeepseekV2Router):
        return gate(x_ND)
    base, adapters = unwrap(gate)
    logits = base(x_ND)
    with torch.autocast(x_ND.device.type, enabled=False):
        for adapter in adapters.get("weight", []):
            x = adapter.dropout(x_ND.float())
            logits = logits + F.linear(F.linear(x, adapter.a.float()), adapter.b.float()) * adapter.scaling
    return logits


class DeepseekV2Experts(nn.Module):
    """The fused weights of the routed experts: gate_up_proj [E, 2F, D], down_proj [E, D, F]. `run_experts` computes
    with them.

    storages: {name: how the weight is stored}, if they are quantised. held: under expert parallelism, those of all
    experts that this process has; `num_experts` is their number then, and `forward` is called. adapters: of these
    experts, during that call.
    """

    storages: Mapping[str, Storage] = MappingProxyType({})
    held: slice | None = None

    def __init__(self, config: DeepseekV2Config):
        super().__init__()
        self.num_experts = self.all_experts = config.n_routed_experts or 0
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]
        self.adapters: dict[str, list[ActiveAdapter]] = {}

    def forward(self, x_ND: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs, [N, D] in x's dtype; the arguments are those of stock's
        experts."""
        return weighted_sum(Routed(self, self.adapters, x_ND, weights_NK.float(), experts_NK)).to(x_ND.dtype)

    def weight_of(self, name: str) -> Weight:
        """The weight of this name, as products read it."""
        tensor, storage = getattr(self, name), self.storages.get(name)
        if storage is not None and self.held is not None:
            storage = replace(storage, shape=(len(tensor), *storage.shape[1:]))
        return opened(tensor, storage)

    def linear(self, name: str, groups: Groups, x_SI: torch.Tensor, adapters: Sequence[ActiveAdapter]) -> torch.Tensor:
        """[S, O]: rows sorted by expert, times the experts' weights of this name, including adapters."""
        return groups.linear(x_SI, self.weight_of(name), adapters)


class Routed(NamedTuple):
    """The inputs of the routed experts. experts: the module without PEFT's wrappers; adapters: the active adapters of
    each of its weights."""

    experts: Any
    adapters: dict[str, list[ActiveAdapter]]
    x_ND: torch.Tensor
    weights_NK: torch.Tensor
    experts_NK: torch.Tensor

    def parts(self) -> Iterator["Routed"]:
        """Chunks of TOKENS tokens, to keep intermediate activations small."""
        for x, weights, chosen in zip(*(t.split(TOKENS) for t in self[2:]), strict=True):
            yield self._replace(x_ND=x, weights_NK=weights, experts_NK=chosen)


def one_function(routed: Routed) -> torch.Tensor:
    """Computes the experts as one autograd function (`kernels.expert_training`)."""
    experts, adapters, x_ND, weights_NK, experts_NK = routed
    slots, groups = place_slots(experts_NK, experts.num_experts, fills_up(x_ND, experts_NK, experts.num_experts))
    return train_experts(experts, adapters, x_ND.to(compute_dtype(x_ND)), weights_NK, slots, groups)


def one_by_one(routed: Routed) -> torch.Tensor:
    """Computes the experts step by step, with the module's own `linear`."""
    experts, adapters, x_ND, weights_NK, experts_NK = routed
    x_PD, groups, slots = dispatch(x_ND, experts_NK, experts.num_experts)
    hidden = experts.linear("gate_up_proj", groups, x_PD, adapters.get("gate_up_proj", []))
    hidden = gated(*hidden.chunk(2, dim=-1), experts.act_fn)
    return combine(experts.linear("down_proj", groups, hidden, adapters.get("down_proj", [])), weights_NK, slots)


def by_weights(kernel: Callable[..., torch.Tensor], routed: Routed) -> torch.Tensor:
    """Computes the experts with a kernel that takes their weights and knows no adapters."""
    experts, _, x_ND, weights_NK, experts_NK = routed
    x_ND = x_ND.to(compute_dtype(x_ND))
    return kernel(x_ND, weights_NK, experts_NK, experts.gate_up_proj, experts.down_proj, experts.act_fn)


def uses_own_linear(routed: Routed) -> bool:
    """Whether the module's own `linear` is used, which the faster ways replace, outside compiled code."""
    return type(routed.experts).linear is DeepseekV2Experts.linear and not torch.compiler.is_compiling()


def trains_plainly(routed: Routed) -> bool:
    """Whether gradients are needed, and the adapters have no dropout."""
    adapters = [adapter for of_weight in routed.adapters.values() for adapter in of_weight]
    plain = uses_own_linear(routed) and all(isinstance(adapter.dropout, nn.Identity) for adapter in adapters)
    return plain and torch.is_grad_enabled()


def has_plain_weights(routed: Routed) -> bool:
    """Whether the experts run on a CPU without gradients or conversions, on weights that products read as they are.
    Under expert parallelism some slots are another process's, which the kernels for this do not know."""
    if torch.is_grad_enabled() or routed.x_ND.device.type != "cpu" or not uses_own_linear(routed):
        return False
    if routed.experts.held is not None:
        return False
    weights = (routed.experts.gate_up_proj, routed.experts.down_proj)
    return all(is_plain(w) and w.dtype == compute_dtype(routed.x_ND) for w in weights)


def runs_plainly(routed: Routed) -> bool:
    """Whether only plain weights are multiplied, without adapters."""
    return not any(routed.adapters.values()) and has_plain_weights(routed)


def has_one_token(routed: Routed) -> bool:
    return len(routed.x_ND) == 1 and runs_plainly(routed)


def has_few_rows(routed: Routed) -> bool:
    """Whether small experts have a few rows each, as in decoding a batch."""
    return runs_plainly(routed) and is_worth_padding(routed.experts_NK, routed.experts.gate_up_proj)


def scores_by_onednn(routed: Routed) -> bool:
    """Whether experts with many rows each run in float32 products of oneDNN."""
    weights = (routed.experts.gate_up_proj, routed.experts.down_proj)
    worth = is_worth_it(routed.x_ND, routed.experts_NK, routed.experts.num_experts)
    return worth and has_plain_weights(routed) and all(weight.is_contiguous() for weight in weights)


def in_cache(routed: Routed) -> torch.Tensor:
    """Computes the experts one after the other (`kernels.expert_scoring`)."""
    experts, adapters, x_ND, weights_NK, experts_NK = routed
    weights = experts.gate_up_proj, experts.down_proj
    x_ND = x_ND.to(compute_dtype(x_ND))
    return one_after_another(x_ND, weights_NK, experts_NK, *weights, adapters, experts.act_fn)


def at_once(routed: Routed) -> bool:
    """Whether to run all tokens at once: on a GPU, and if the experts' weights are trained, since each chunk would then
    allocate a gradient of the size of all their weights."""
    trains = routed.experts.gate_up_proj.requires_grad or routed.experts.down_proj.requires_grad
    return trains or routed.x_ND.device.type != "cpu"


class Way(NamedTuple):
    """A way to compute the experts; all give the same results. applies: whether it can be used. whole: whether it runs
    all tokens at once rather than in chunks."""

    applies: Callable[[Routed], bool]
    run: Callable[[Routed], torch.Tensor]
    whole: Callable[[Routed], bool]


# The first way that applies is used.
WAYS = {
    "training": Way(trains_plainly, one_function, at_once),
    "one token": Way(has_one_token, partial(by_weights, experts_of_one_token), lambda _: True),
    "few rows each": Way(has_few_rows, partial(by_weights, few_rows_each), lambda _: True),
    "one after the other": Way(scores_by_onednn, in_cache, lambda _: True),
    "other gradients": Way(lambda _: torch.is_grad_enabled(), one_by_one, lambda _: True),
    "a GPU": Way(lambda routed: routed.x_ND.device.type != "cpu", one_by_one, lambda _: True),
    "a CPU": Way(lambda _: True, one_by_one, lambda _: False),
}


def weighted_sum(routed: Routed) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, [N, D] float32."""
    way = next(way for way in WAYS.values() if way.applies(routed))
    outs = [way.run(part) for part in ([routed] if way.whole(routed) else routed.parts())]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def exchanged(routed: Routed) -> torch.Tensor:
    """`weighted_sum` under expert parallelism: transformers has put the exchange of tokens before and after the
    experts' own forward."""
    experts, adapters, x_ND, weights_NK, experts_NK = routed
    experts.adapters = {
        name: [a.held_by(experts.held, experts.all_experts) for a in each] for name, each in adapters.items()
    }
    try:
        return experts(x_ND, experts_NK, weights_NK)
    finally:
        experts.adapters = {}


def run_experts(experts: nn.Module, x_ND: torch.Tensor, weights_NK: torch.Tensor, experts_NK: torch.Tensor):
    """The weighted sum of the chosen experts' outputs, including adapters on the experts: [N, D], float32 on a process
    that has all experts, otherwise in x's dtype."""
    routed = Routed(*unwrap(experts), x_ND, weights_NK, experts_NK)
    return weighted_sum(routed) if routed.experts.held is None else exchanged(routed)


class DeepseekV2MoE(nn.Module):
    """The MoE block: routed experts plus shared experts (paper, eq. 20-22)."""

    def __init__(self, config: DeepseekV2Config):
        super().__init__()
        self.config = config
        self.experts = DeepseekV2Experts(config)
        self.gate = DeepseekV2Router(config)
        shared = config.n_shared_experts or 0
        self.shared_experts = DeepseekV2MLP(config, shared * config.moe_intermediate_size) if shared else None

    def forward(self, x: torch.Tensor, replayed: torch.Tensor | None = None) -> tuple[torch.Tensor, RouterOutput]:
        """x [B, T, D] -> (y [B, T, D], router logits and chosen experts). replayed [B, T, K]: experts to use instead of
        choosing them; -1 where they are to be chosen."""
        x_ND = x.flatten(0, 1)
        logits = router_logits(self.gate, x_ND)
        scores = expert_scores(self.config, logits)
        bias_E = getattr(unwrap(self.gate)[0], CORRECTION_BIAS)
        if replayed is None:
            chosen = choose_experts(self.config, scores, bias_E)
        else:
            chosen = replayed_experts(self.config, scores, replayed.flatten(0, 1), bias_E)
        y_ND = run_experts(self.experts, x_ND, expert_weights(self.config, scores, chosen), chosen)
        y = y_ND.to(x.dtype).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, RouterOutput(logits, chosen)
