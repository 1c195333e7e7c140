"""A model's weights under the hub's names, with its adapters merged, for engines that load them while it trains."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..checkpoints.hub_layout import pieces_of
from ..errors import ModelError
from ..kernels.grouped_products import ActiveAdapter
from ..layers.peft_factors import unwrap
from .copies import can_merge, merged_weight, without_peft


@torch.no_grad()
def hub_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight, in the same order each time; each projection of each expert is a tensor of its
    own, and a tied weight comes once. One parameter at a time is merged, in float32, and rounded to its own dtype.

    `check_mergeable` tells whether all adapters can be merged; others are left out here.
    """
    seen = set[int]()
    for name, weight, adapters in _weights(without_peft(model), ""):
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        value = merged_weight(weight, adapters, weight.dtype) if adapters else weight.detach()
        for hub_name, piece in pieces_of(name, tuple(value.shape)).items():
            yield hub_name, value if piece.place is None else value[piece.place]


def check_mergeable(model: nn.Module) -> None:
    """Raises ModelError if an adapter cannot be merged into its weight."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not can_merge(module):
            raise ModelError(
                f"the adapter of {name} cannot be merged into its weight (DoRA or another variant, or a quantised "
                "weight); train plain LoRA on weights that are not quantised"
            )


def _weights(module: Any, prefix: str) -> Iterator[tuple[str, nn.Parameter, list[ActiveAdapter]]]:
    """(name without PEFT's wrappers, weight, its active adapters)."""
    adapters: dict[str, list[ActiveAdapter]] = {}
    if isinstance(module, LoraLayer):
        module, adapters = unwrap(module)
    for name, weight in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", weight, adapters.get(name, [])
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.")
