"""Loads models for inference, scoring or training, and saves them."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters.files import with_labels
from .adapters.loading import adapts_embeddings, continues, load_adapter
from .adapters.lora import LoraSettings, apply_lora, train_in_float32
from .adapters.merge import merge_lora
from .checkpoints.finite import check_finite
from .checkpoints.generation_files import check_generation
from .checkpoints.sources import (
    TASKS,
    AdapterSource,
    Head,
    ModelSource,
    base_directory,
    load_tokenizer,
    read_adapter,
    read_settings,
    resolve_source,
)
from .checkpoints.tensor_files import base_headers, whole_directory
from .checkpoints.tokenizer_files import save_tokenizer
from .configuration import DeepseekV2Config
from .errors import ModelError
from .esft.choice import ExpertChoice
from .esft.full_weights import train_chosen_experts
from .kernels.float32_products import Linear
from .layers.moe import DeepseekV2Router
from .modeling import HEADS
from .outline import apply_settings, check_vocabulary, check_weights, meta_model

# What the floors above open a model with, from one place.
__all__ = [
    "HEADS",
    "TASKS",
    "AdapterSource",
    "Head",
    "LoraSettings",
    "ModelSource",
    "apply_settings",
    "check_generation",
    "check_vocabulary",
    "check_weights",
    "load_base",
    "load_lm_head",
    "load_model",
    "load_tokenizer",
    "meta_model",
    "prepare_trainable",
    "read_adapter",
    "read_settings",
    "resolve_source",
    "save_directory",
    "write_model",
]


def load_base(
    base: str,
    head: Head = "causal_lm",
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
    config: Mapping[str, Any] | None = None,
    settings: DeepseekV2Config | None = None,
    heads: int | None = None,
) -> PreTrainedModel:
    """A checkpoint in hub layout, every tensor accounted for.

    config: settings to override, e.g. {"aux_loss_alpha": 0.003}; unknown ones are errors.
    settings: those of the checkpoint, where they have been read already. heads: of a reward model; None for as many as
    the checkpoint has, one where it has none.
    """
    settings = apply_settings(copy.deepcopy(settings) or read_settings(base), head, config, heads)
    check_generation(base, settings.vocab_size)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return HEADS[head].from_pretrained(base, config=settings, dtype=dtype, attn_implementation=attn_implementation)


def load_model(
    source: ModelSource,
    *,
    head: Head = "causal_lm",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> PreTrainedModel | PeftModel:
    """A frozen model in eval mode, adapter included: for answering, scoring, evaluating."""
    settings = with_labels(source.settings, source.adapter.header) if source.adapter else source.settings
    model: Any = load_base(source.base, head, dtype, attn_implementation, config, settings)
    if source.adapter:
        model = load_adapter(model, source.adapter, trainable=False, task_type=TASKS[head])
    return model.requires_grad_(False).eval()


def load_lm_head(source: ModelSource, dtype: str = "float32", attn_implementation: str | None = None) -> nn.Module:
    """The frozen LM head alone: of a base only its one tensor is read. An adapter on embeddings or head needs the whole
    model for a moment.

    Raises:
        ModelError: the tensor is missing, has another shape or is not finite.
    """
    if source.adapter and any("embed_tokens" in name or "lm_head" in name for name in source.adapter.header):
        model: Any = load_model(source, dtype=dtype, attn_implementation=attn_implementation)
        return model.get_output_embeddings()
    config, base = source.settings, base_directory(source.base)
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    path = next((path for path, infos in base_headers(base).items() if name in infos), None)
    if path is None:
        raise ModelError(f"{base}: {name} is missing")
    with safe_open(path, "pt") as file:
        weight = check_finite(name, file.get_tensor(name), base)
    if weight.shape != (config.vocab_size, config.hidden_size):
        raise ModelError(f"{base}: {name} is {tuple(weight.shape)}, not {(config.vocab_size, config.hidden_size)}")
    head = Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
    head.weight = nn.Parameter(weight.to(getattr(torch, dtype)), requires_grad=False)
    return head


def merge_into(source: ModelSource, out_dir: Path, dtype: str) -> str:
    """Writes the base with the adapter merged to out_dir, unless it is there already. Returns out_dir.

    Raises:
        ModelError: out_dir is the base itself, or cannot be written.
    """
    assert source.adapter is not None
    if out_dir.resolve() == Path(source.base).resolve():
        raise ModelError(
            f"{source.own_dir}: its base model is {out_dir}, where this run merges the two; choose another output_dir"
        )
    if not out_dir.exists():
        merge_lora(source.own_dir, out_dir, dtype)
    return str(out_dir)


def prepare_trainable(
    source: ModelSource,
    *,
    lora: LoraSettings | None,
    merge_dir: Path,
    experts: ExpertChoice | None = None,
    head: Head = "causal_lm",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    config: Mapping[str, Any] | None = None,
    heads: int | None = None,
    router: bool = True,
) -> PreTrainedModel | PeftModel:
    """A model ready for a trainer. Trainable weights are float32 whatever `dtype` (that of frozen weights) is.

    An adapter with the same targets, ranks and experts is trained on; with others, or for full fine-tuning, it is
    merged into `merge_dir` first. experts: those that train (of the routed ones); without LoRA everything else is
    frozen. heads: of a reward model, as in `load_base`. router: whether full fine-tuning trains the routers.
    """
    wanted = lora.config(TASKS[head]) if lora else None
    if source.adapter and not (wanted and continues(source.adapter, wanted, experts, source.settings)):
        source = ModelSource(merge_into(source, merge_dir, dtype))
    frozen_dtype = dtype if lora or experts else "float32"
    model: Any = load_base(source.base, head, frozen_dtype, attn_implementation, config, source.settings, heads)
    if wanted is None or lora is None:
        if experts is not None:
            train_chosen_experts(model, experts)
            train_in_float32(model)
        elif not router:
            freeze_routers(model)
        return model.train()
    if source.adapter:
        adapted = load_adapter(model, source.adapter, True, lora.dropout, TASKS[head], experts)
    else:
        adapted = apply_lora(model, wanted, experts=experts)
    return adapted.train()


def freeze_routers(model: nn.Module) -> None:
    """Freeze the weights that choose the experts; everything else stays as it is."""
    for module in model.modules():
        if isinstance(module, DeepseekV2Router):
            module.requires_grad_(False)


def save_directory(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, out_dir: Path, dtype: str | None = None
) -> None:
    """Writes a model (hub layout) or an adapter (PEFT's layout), with its tokenizer, in one atomic step.

    Raises:
        ModelError: out_dir is there already and not empty, its disk is full, or it cannot be written.
    """
    with whole_directory(out_dir) as temporary:
        write_model(model, tokenizer, temporary, dtype)


def write_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: str | None = None
) -> None:
    """The files of `save_directory`, into a directory that is there. RL's reference adapter ("ref") is left out."""
    if isinstance(model, PeftModel):
        # "auto" would do, with a warning where embeddings are adapted.
        whole = True if adapts_embeddings(model) else "auto"
        model.save_pretrained(str(directory), save_embedding_layers=whole, selected_adapters=["default"])
    else:
        state = None
        if dtype is not None:
            wanted = getattr(torch, dtype)
            state = {k: v.to(wanted) if v.is_floating_point() else v for k, v in model.state_dict().items()}
        model.save_pretrained(str(directory), state_dict=state)
        if dtype is not None:
            path = directory / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, directory)
