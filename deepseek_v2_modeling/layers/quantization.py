"""Which weights of a model are stored in fewer bits: linear layers and routed experts of its layers.

Embeddings, norms, routers and heads stay as they are. With nf4, attention is in int8: it is 4 % of DeepSeek-V2's
weights, and in 4 bits it spoils the gradients more than all the rest does (docs/log.md).
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..kernels.float32_products import Linear
from ..kernels.quantized_weights import BLOCK, SCHEMES, QuantizedLinear, SchemeName, Storage
from .attending import AttentionBlock
from .moe import DeepseekV2Experts

Quantization = SchemeName  # by the scheme of most weights
IN_ATTENTION: dict[Quantization, SchemeName] = {"nf4": "int8", "int8": "int8"}


def check_quantization_library(quantization: str) -> None:
    """Load the kernels that a quantization needs. Raises ModelError if it is unknown, or they are not installed."""
    if quantization not in SCHEMES:
        raise ModelError(f'quantization is "{quantization}": use one of {", ".join(SCHEMES)}')
    library = SCHEMES[quantization].library
    if library is None:
        return
    if importlib.util.find_spec(library) is None:
        raise ModelError(f"quantization {quantization} needs {library}, which is not installed: pip install {library}")
    importlib.import_module(library)


def quantize_layers(model: nn.Module, quantization: Quantization) -> None:
    """Give a model without weights (on the meta device) the parameters that hold quantised ones.

    Raises:
        ModelError: rows of a weight are not a multiple of BLOCK values, or the model has weights already.
    """
    module: Any
    for name, module, weight, scheme in _weights(model, quantization):
        parameter = module.get_parameter(weight)
        if not parameter.is_meta:
            raise ModelError("quantization is done while a checkpoint is read: use from_pretrained(..., quantization=)")
        if parameter.shape[-1] % BLOCK:
            raise ModelError(
                f"{name} has rows of {parameter.shape[-1]} values, which are quantised in blocks of {BLOCK}: load this "
                "model without quantization"
            )
        storage = Storage(scheme, tuple(parameter.shape))
        stored = torch.empty(storage.stored_shape, dtype=torch.uint8, device="meta")
        module.register_parameter(weight, nn.Parameter(stored, requires_grad=False))
        module.storages = {**getattr(module, "storages", {}), weight: storage}
        if isinstance(module, Linear):
            module.__class__ = QuantizedLinear


def _weights(model: nn.Module, quantization: Quantization) -> Iterator[tuple[str, Any, str, SchemeName]]:
    """(full name, module, name in the module, scheme) of each weight that is quantised."""
    in_attention = [module for module in model.modules() if isinstance(module, AttentionBlock)]
    linears = {id(part) for attention in in_attention for part in attention.children()}
    layers = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    module: Any
    for path, module in model.get_submodule(layers).named_modules(prefix=layers):
        if isinstance(module, DeepseekV2Experts):
            for name in ("gate_up_proj", "down_proj"):
                yield f"{path}.{name}", module, name, quantization
        elif type(module) is Linear:
            scheme = IN_ATTENTION[quantization] if id(module) in linears else quantization
            yield f"{path}.weight", module, "weight", scheme


def storages(model: nn.Module) -> dict[str, Storage]:
    """{parameter: how it is stored} of a model's quantised weights; empty if it has none."""
    found: dict[str, Storage] = {}
    for path, module in model.named_modules():
        own: dict[str, Storage] = getattr(module, "storages", {})
        found |= {f"{path}.{name}": storage for name, storage in own.items()}
    return found


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a model is quantised, with or without adapters; None if it is not."""
    schemes = {storage.scheme for storage in storages(model).values()}
    return next((name for name in SCHEMES if name in schemes), None)  # nf4 before int8, which is beside it


def tell_shapes(model: nn.Module) -> None:
    """Note at each quantised parameter the shape of its values, where PEFT reads that of one that is divided among
    processes (`ds_shape`)."""
    for name, storage in storages(model).items():
        model.get_parameter(name).ds_shape = torch.Size(storage.shape)  # pyright: ignore[reportAttributeAccessIssue]
