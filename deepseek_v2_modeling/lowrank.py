"""Reads the LoRA adapters that PEFT put around a module, so that the model can compute them its own way.

PEFT's ParamWrapper forms W + s B A for all experts at every forward. We leave the wrappers where they are, as
the owners of the weights (saving, switching, disabling and merging stay PEFT's), read the factors of the
active adapters, and add s (x A) B beside the base product.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from torch.nn import functional as F

from .grouped import Groups


@dataclass
class LowRank:
    """One active adapter of one weight. a [r, I] and b [O, r], or a [E, r, I] and b [E, O, r] for experts."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: nn.Module


def _factors(layer: Any, name: str) -> LowRank:
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    experts = getattr(layer, "num_experts", 1)
    if experts > 1:
        # PEFT's layout: the expert is the slowest index of A's rows and the fastest of B's columns.
        a = a.unflatten(0, (experts, -1))
        b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return LowRank(a, b, layer.scaling[name], layer.lora_dropout[name])


def unwrap(module: Any) -> tuple[Any, dict[str, list[LowRank]]]:
    """The module under PEFT's wrappers, and by parameter name the adapters that are active on it now."""
    adapters: dict[str, list[LowRank]] = {}
    while isinstance(module, LoraLayer):
        if module.disable_adapters and module.merged:
            module.unmerge()  # as PEFT's own forward does
        if not (module.disable_adapters or module.merged):
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            names = [name for name in module.active_adapters if name in module.lora_A]
            adapters.setdefault(parameter, []).extend(_factors(module, name) for name in names)
        module = module.base_layer
    return module, adapters


def _product(x: torch.Tensor, adapter: LowRank) -> torch.Tensor:
    x = adapter.dropout(x)
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(adapter.a.dtype)
    return F.linear(F.linear(x, adapter.a), adapter.b) * adapter.scaling


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """module(x) for an nn.Linear with or without PEFT's wrappers; W + s B A is never formed."""
    if type(module) is nn.Linear:
        return module(x)
    base, adapters = unwrap(module)
    y = base(x)
    for adapter in adapters.get("weight", []):
        y = y + _product(x, adapter).to(y.dtype)
    return y


def grouped_linear(
    groups: Groups, x_SI: torch.Tensor, weight_EOI: torch.Tensor, adapters: list[LowRank]
) -> torch.Tensor:
    """[S, O]: the experts' product and, beside it, their adapters' on the same rows."""
    y_SO = groups.linear(x_SI, weight_EOI)
    for adapter in adapters:
        x = adapter.dropout(x_SI)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(adapter.a.dtype)
        share = groups.linear(groups.linear(x, adapter.a), adapter.b) * adapter.scaling
        y_SO = y_SO + share.to(y_SO.dtype)
    return y_SO
