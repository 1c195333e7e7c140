"""Biases of routers in an adapter's file: whole tensors of the base under their own names, as PEFT keeps embeddings, so
that stock PEFT puts them in place too, and merging replaces the base's."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from ..checkpoints.adapter_config import WEIGHTS
from ..configuration import CORRECTION_BIAS, SPEED

OWN = "biases_of_adapter"  # set on a model whose biases came with an adapter


def router_biases(model: nn.Module) -> dict[str, torch.Tensor]:
    """{name: bias [E] float32} of all MoE layers, in order."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(CORRECTION_BIAS)}


def moves_biases(model: Any) -> bool:
    """Whether the biases of a model under adapters are not, or not for long, those of its base."""
    return bool(getattr(model.config, SPEED, 0)) or getattr(_base(model), OWN, False)


def mark_as_own(model: Any) -> None:
    """Note that the biases came with an adapter, so that they are saved with it again."""
    setattr(_base(model), OWN, True)


def own_biases(model: Any) -> dict[str, torch.Tensor]:
    """The biases of a model if they came with an adapter."""
    return router_biases(model) if getattr(_base(model), OWN, False) else {}


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def save_biases(model: Any, directory: Path) -> None:
    """Add the biases to an adapter's file if they are not those of its base."""
    if not (isinstance(model, PeftModel) and moves_biases(model)):
        return
    biases = {name: bias.detach().cpu().clone() for name, bias in router_biases(model).items()}
    file, new = directory / WEIGHTS, directory / f"{WEIGHTS}.new"
    save_file({**load_file(file), **biases}, new, metadata={"format": "pt"})  # the old one is still mapped into memory
    os.replace(new, file)
