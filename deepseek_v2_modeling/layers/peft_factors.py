"""Reads the LoRA factors from PEFT's wrappers around a module, so that the model can compute adapters efficiently.

PEFT's ParamWrapper computes W + s B A for all experts at every forward. The wrappers stay in place and own the weights
(PEFT still saves, switches, disables and merges adapters), but the model reads the factors of the active adapters and
adds s (x A) B to the base product.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from torch.nn import functional as F

from ..errors import ModelError
from ..kernels.grouped_products import ActiveAdapter


def _factors(layer: Any, name: str) -> ActiveAdapter:
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    chosen: tuple[int, ...] | None = getattr(layer, "chosen", None)  # of chosen_lora.ChosenWrapper
    experts = getattr(layer, "num_experts", 1)
    if isinstance(layer, ParamWrapper) and layer.get_param().ndim == 3:
        held, rank = experts if chosen is None else len(chosen), layer.r[name]
        # PEFT's layout: the expert is the slowest index of A's rows and the fastest of B's columns.
        a = a.unflatten(0, (held, rank))
        b = b.unflatten(1, (rank, held)).permute(2, 0, 1)
    return ActiveAdapter(a, b, layer.scaling[name], layer.lora_dropout[name], chosen)


def _refuse_by_row(module: Any) -> None:
    """Raise ModelError if PEFT was given adapters per row: the factors read here are applied to all rows."""
    for hook in module._forward_pre_hooks.values():
        if keywords := {"adapter_names", "alora_offsets"} & set(getattr(hook, "keywords", ())):
            raise ModelError(
                f"{keywords.pop()}: lora.ParamWrapper does not support mixed adapter batches yet: run each adapter on "
                "a batch of its own (set_adapter), or leave experts, dense layers and the router out of its targets"
            )


def unwrap(module: Any) -> tuple[Any, dict[str, list[ActiveAdapter]]]:
    """The module under PEFT's wrappers, and its currently active adapters by parameter name."""
    adapters: dict[str, list[ActiveAdapter]] = {}
    while isinstance(module, LoraLayer):
        _refuse_by_row(module)
        if module.disable_adapters and module.merged:
            module.unmerge()  # as PEFT's own forward does
        if not (module.disable_adapters or module.merged):
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            names = [name for name in module.active_adapters if name in module.lora_A]
            adapters.setdefault(parameter, []).extend(_factors(module, name) for name in names)
        module = module.base_layer
    return module, adapters


def beyond_lora(layer: Any) -> bool:
    """Whether one of PEFT's wrappers computes more than s B A x: DoRA and similar variants (AdaLoRA's factors are not
    modules), a bias of B, or adapter names per row."""
    plain = isinstance(layer.lora_A, nn.ModuleDict)
    return bool(not plain or layer._forward_pre_hooks or layer.lora_variant or any(layer.lora_bias.values()))


def _plain_lora(module: nn.Module) -> bool:
    """Whether the module is in PEFT's wrappers, which compute only s B A x and are not offloaded (accelerate loads
    offloaded weights in their own forward)."""
    layer: Any = module
    while isinstance(layer, LoraLayer):
        if beyond_lora(layer) or hasattr(layer, "_hf_hook"):
            return False
        layer = layer.base_layer
    return layer is not module


class _AddedShare(torch.autograd.Function):
    """Adds scaling * (x a^T) b^T to y [N, O] in place, computed in y's dtype. x [N, I], a [r, I], b [O, r]."""

    @staticmethod
    def forward(
        ctx: Any, scaling: float, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(y.device.type, enabled=False):
            low = x.to(y.dtype) @ a.to(y.dtype).t()
            y.addmm_(low, b.to(y.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,), (x, low, a, b) = grads, ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            g_low = (g @ b.to(g.dtype)) * ctx.scaling
            dx = (g_low @ a.to(g.dtype)).to(x.dtype) if ctx.needs_input_grad[2] else None
            da = (g_low.t() @ x.to(g.dtype)).to(a.dtype) if ctx.needs_input_grad[3] else None
            db = ((g.t() @ low) * ctx.scaling).to(b.dtype) if ctx.needs_input_grad[4] else None
        return None, g, dx, da, db


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """module(x) for an nn.Linear with or without PEFT's wrappers. W + s B A is never materialised, and low-rank
    products are in the dtype of the base product. x is made contiguous for the reason given in
    `float32_products.Linear`."""
    x = x.contiguous()
    if not _plain_lora(module):
        return module(x)
    base, adapters = unwrap(module)
    y = base(x)
    y_NO = y.flatten(0, -2)
    for adapter in adapters.get("weight", []):
        x_NI = adapter.dropout(x).flatten(0, -2)
        if torch.compiler.is_compiling():
            low = F.linear(x_NI.to(y.dtype), adapter.a.to(y.dtype))
            y_NO = torch.addmm(y_NO, low, adapter.b.to(y.dtype).t(), alpha=adapter.scaling)
        else:
            y_NO = _AddedShare.apply(adapter.scaling, y_NO, x_NI, adapter.a, adapter.b)
    return y_NO.view_as(y)
