"""Several models on one base in memory: each has a head and adapters of its own, and the base's weights are the same
tensors in all of them."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..checkpoints.sources import Head, ModelSource
from ..configuration import DeepseekV2Config
from ..layers.quantization import quantization_of
from ..layers.rope import RotaryEmbedding
from ..outline import meta_model
from .router_biases import moves_biases, router_biases

_WRAPPED = "base_layer."
_BACKBONE = "model."


def base_weights(model: Any) -> dict[str, nn.Parameter]:
    """{name: parameter} of a model's backbone below its adapters, by the names of the model without them."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    plain = {name.replace(_WRAPPED, ""): p for name, p in base.named_parameters() if ".lora_" not in name}
    return {name: parameter for name, parameter in plain.items() if name.startswith(_BACKBONE)}


def base_buffers(model: Any) -> dict[str, torch.Tensor]:
    """{name: buffer} of a model's backbone, by the names of the model without adapters."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name.replace(_WRAPPED, ""): buffer for name, buffer in base.named_buffers() if name.startswith(_BACKBONE)}


def reason_not_to_share(model: Any, source: ModelSource, dtype: str) -> str | None:
    """Why a model of `source`, in `dtype`, cannot run on the base weights of `model`; None if it can."""
    base = str(model.config.name_or_path)
    if source.adapter is None:
        return "it is a full model, not an adapter"
    if any(name in key and "lora_" not in key for key in source.adapter.header for name in ("embed_tokens", "lm_head")):
        return "its adapter has embeddings of its own"
    if source.adapter.has_biases or (router_biases(model) and moves_biases(model)):
        return "the routers of the two have other biases"
    if base != source.base and Path(base).resolve() != Path(source.base).resolve():
        return f"this stage's model is on another base, {base}"
    weights = base_weights(model).values()
    if any(weight.requires_grad for weight in weights):
        return "this stage trains the weights of its base"
    if other := {weight.dtype for weight in weights if weight.is_floating_point()} - {getattr(torch, dtype)}:
        return f"this stage's base is in {str(other.pop()).removeprefix('torch.')}"
    if any(weight.is_meta or type(weight) is not nn.Parameter for weight in weights):
        return "this stage's base is sharded or offloaded"
    return None


def model_on_base(model: Any, settings: DeepseekV2Config, head: Head, attn_implementation: str | None = None) -> Any:
    """A model whose backbone has the very weights of the base of `model`, and a head of zeros, in evaluation mode.

    settings: of a model with that head and the same backbone. To move one to another device moves the weights of both.
    """
    if attn_implementation is not None:
        settings._attn_implementation = attn_implementation
    shared = base_weights(model)
    like = next(iter(shared.values()))
    new = meta_model(settings, head, quantization_of(model))
    for name, parameter in list(new.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        zeros = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
        setattr(new.get_submodule(owner), leaf, shared.get(name, nn.Parameter(zeros, requires_grad=False)))
    for name, buffer in base_buffers(model).items():
        owner, _, leaf = name.rpartition(".")
        new.get_submodule(owner).register_buffer(leaf, buffer)
    new.model.rotary_emb = RotaryEmbedding(settings).to(like.device)
    return new.eval()
