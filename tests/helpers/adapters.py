"""Adapters on disk for the tests of merging, export and import."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as stock

from deepseek_v2_modeling import lora_config
from deepseek_v2_modeling.checkpoints.adapter_config import CONFIG, WEIGHTS
from deepseek_v2_modeling.loading import load_base, save_directory

from .models import logits_of, random_adapter, random_ids, small_model, tokenizer

EVERYWHERE = ("attention", "experts", "shared_experts", "dense", "router")
IDS = random_ids(2, 12)


def make_base(directory: Path, max_shard_size: str = "5GB", **changes: Any) -> Path:
    model = small_model(**changes)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(directory)
    return directory


def make_adapter(directory: Path, base: Path, targets: Iterable[str] = EVERYWHERE, **settings: Any) -> torch.Tensor:
    """Writes a random adapter on the base; returns the logits that it gives in our model."""
    model = random_adapter(load_base(str(base)), lora_config(targets, **{"r": 2, "alpha": 3, **settings}))
    save_directory(model, tokenizer(), directory)
    return logits_of(model, IDS)


def stock_adapter(base: Path, adapter: Path) -> torch.Tensor:
    """The logits of stock PEFT on stock transformers."""
    model = stock.DeepseekV2ForCausalLM.from_pretrained(base)
    return logits_of(PeftModel.from_pretrained(model, adapter).eval(), IDS)


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(adapter: Path, drop: Iterable[str] = (), **put: torch.Tensor) -> None:
    tensors = load_file(adapter / WEIGHTS)
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name not in set(drop)}
    save_file(kept | put, adapter / WEIGHTS, metadata={"format": "pt"})
