"""A copy of a model for decoding: adapters are merged into weights of its own, all other weights are shared.

The model itself is not modified, so nothing has to be undone if decoding fails.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from ..kernels.float32_products import is_plain
from ..kernels.grouped_products import ActiveAdapter
from ..layers.peft_factors import beyond_lora, unwrap

HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
AT_ONCE = 8  # experts whose weights are summed in float32 at a time
Make = Callable[[nn.Parameter, Sequence[ActiveAdapter]], nn.Parameter]


@torch.no_grad()
def merged_copy(model: Any, dtype: torch.dtype | None = None) -> Any:
    """The model with its active adapters merged and without PEFT's wrappers; all weights in `dtype`, None for each
    weight's own.

    Sums are in float32. What cannot be merged stays an adapter: DoRA and other variants, adapters on embeddings or
    quantised weights. The copy does not follow later changes of the adapters.
    """
    held: dict[int, nn.Parameter] = {}  # tied weights stay tied

    def make(weight: nn.Parameter, adapters: Sequence[ActiveAdapter]) -> nn.Parameter:
        wanted = _dtype_of(weight, dtype)
        if not adapters and wanted == weight.dtype:
            return weight
        if adapters:
            return nn.Parameter(merged_weight(weight, adapters, wanted), requires_grad=False)
        if id(weight) not in held:
            held[id(weight)] = nn.Parameter(weight.to(wanted), requires_grad=False)
        return held[id(weight)]

    return _twin(without_peft(model), make)


def copied_bytes(model: Any, dtype: torch.dtype | None = None) -> int:
    """Bytes that `merged_copy` would allocate."""
    counted: dict[int, int] = {}

    def make(weight: nn.Parameter, adapters: Sequence[ActiveAdapter]) -> nn.Parameter:
        wanted = _dtype_of(weight, dtype)
        if adapters or wanted != weight.dtype:
            counted[id(weight)] = weight.numel() * wanted.itemsize
        return weight

    _twin(without_peft(model), make)
    return sum(counted.values())


def without_peft(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _dtype_of(weight: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a weight in the copy; quantised weights keep theirs."""
    plain = is_plain(weight) and weight.is_floating_point() and weight.itemsize > 1
    return dtype if dtype is not None and plain else weight.dtype


def _twin(module: nn.Module, make: Make) -> nn.Module:
    """A copy of a module tree with parameters from `make`. Forwards that accelerate and TRL have set on an instance are
    bound to the original and left out."""
    adapters: dict[str, list[ActiveAdapter]] = {}
    if isinstance(module, LoraLayer) and can_merge(module):
        module, adapters = unwrap(module)
    twin = copy.copy(module)
    own: Any = vars(twin)
    own.pop("forward", None)
    own.update({name: value.copy() for name, value in vars(module).items() if name.endswith(HOOKS)})
    weights = module._parameters.items()
    twin._parameters = {n: None if w is None else make(w, adapters.get(n, [])) for n, w in weights}
    twin._buffers = dict(module._buffers)
    twin._modules = {n: None if child is None else _twin(child, make) for n, child in module._modules.items()}
    return twin


def can_merge(layer: Any) -> bool:
    """Whether PEFT's wrappers of this layer only add s B A to a plain weight."""
    while isinstance(layer, LoraLayer):
        plain = isinstance(layer, (LoraLinear, ParamWrapper)) and not beyond_lora(layer) and not layer.merged
        if not plain or hasattr(layer, "_hf_hook"):
            return False
        layer = layer.base_layer
    weights = layer._parameters.values()
    return all(w is None or (is_plain(w) and w.is_floating_point() and w.itemsize > 1) for w in weights)


def merged_weight(weight: torch.Tensor, adapters: Sequence[ActiveAdapter], dtype: torch.dtype) -> torch.Tensor:
    """W + s B A, [O, I] or [E, O, I]."""
    stacked = weight if weight.ndim == 3 else weight[None]
    merged = torch.empty(stacked.shape, dtype=dtype, device=weight.device)
    count = len(stacked)
    factors = [(adapter.spread(adapter.a, count), adapter.spread(adapter.b, count)) for adapter in adapters]
    if weight.ndim == 2:
        factors = [(a[None], b[None]) for a, b in factors]
    for start in range(0, count, AT_ONCE):
        some = slice(start, start + AT_ONCE)
        total = stacked[some].float()
        for adapter, (a, b) in zip(adapters, factors, strict=True):
            total = torch.baddbmm(total, b[some].float(), a[some].float(), alpha=adapter.scaling)
        merged[some] = total
    return merged.view(weight.shape)
