"""Expert parallelism by transformers' plan for it: each process of a group holds some of the routed experts of every
layer, and a token goes to the processes that hold its experts.

Adapters on experts are parts of their layer, which FSDP shards and gathers; each process computes with the factors of
its own experts.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers.distributed.expert_parallel import AllToAllEP, EPImplementationInterface
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from ..kernels.float32_products import compute_dtype
from ..layers.moe import DeepseekV2Experts

EXCHANGE = "deepseek_v2_modeling"  # our way to bring experts their tokens, by its name for transformers


class Exchange(AllToAllEP):
    """Sends tokens in the dtype in which experts compute; their weighted sum is float32, as on one process."""

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return super().__call__(hidden_states.to(compute_dtype(hidden_states)), top_k_index, top_k_weights)


EPImplementationInterface.register(EXCHANGE, Exchange)
# It warns that gathering experts, for final/, takes two operations.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def experts_of(model: nn.Module) -> dict[str, DeepseekV2Experts]:
    """{name: routed experts} of all layers, under PEFT's wrappers too."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DeepseekV2Experts)}


def plan(model: nn.Module) -> dict[str, str]:
    """transformers' plan, for a model with or without adapters."""
    kinds = {replace_layer_number_by_wildcard(name) for name in experts_of(model)}
    weights = {f"{kind}.{name}": "grouped_gemm" for kind in kinds for name in ("gate_up_proj", "down_proj")}
    return weights | dict.fromkeys(kinds, "ep_dispatch_experts")


def note_held(model: nn.Module, mesh: Any) -> None:
    """Tell the experts which of them this process holds. mesh: the processes that the experts are divided among."""
    for experts in experts_of(model).values():
        first = mesh.get_local_rank() * experts.num_experts
        experts.held = slice(first, first + experts.num_experts)
