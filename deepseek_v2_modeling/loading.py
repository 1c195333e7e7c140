"""Loads models for inference, scoring or training, and saves them."""

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .adapters.files import with_labels
from .adapters.loading import adapts_embeddings, continues, load_adapter
from .adapters.lora import LoraSettings, add_reference, apply_lora, of_its_attention, train_in_float32
from .adapters.merge import merge_lora
from .adapters.router_biases import mark_as_own, save_biases
from .adapters.shared_base import model_on_base, reason_not_to_share
from .checkpoints.finite import check_finite
from .checkpoints.generation_files import check_generation, save_end_token
from .checkpoints.hub_layout import dtype_on_disk, without_extra_layers
from .checkpoints.sources import (
    MODEL_CARD,
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
from .checkpoints.stock_classes import stock_differences
from .checkpoints.tensor_files import base_headers, whole_directory
from .checkpoints.tokenizer_files import save_tokenizer
from .configuration import DeepseekV2Config
from .errors import ModelError
from .esft.choice import ExpertChoice
from .esft.full_weights import train_chosen_experts
from .family import check_bias_updates, config_fields
from .kernels.float32_products import Linear
from .layers.moe import DeepseekV2Router
from .layers.quantization import Quantization, check_quantization_library
from .model_classes import model_class
from .outline import apply_settings, check_vocabulary, check_weights, meta_model

Weights = Literal["read", "meta", "placeholders"]

# The names that other packages need to open a model; they import them from here.
__all__ = [
    "TASKS",
    "AdapterSource",
    "Head",
    "LoraSettings",
    "ModelSource",
    "Weights",
    "apply_settings",
    "check_bias_updates",
    "check_generation",
    "check_quantization_library",
    "check_vocabulary",
    "check_weights",
    "config_fields",
    "load_base",
    "load_lm_head",
    "load_model",
    "load_tokenizer",
    "meta_model",
    "model_class",
    "prepare_trainable",
    "read_adapter",
    "read_settings",
    "reason_not_to_share",
    "resolve_source",
    "save_directory",
    "stock_differences",
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
    weights: Weights = "read",
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """Load a checkpoint in hub layout.

    Args:
        config: settings to override, e.g. {"aux_loss_alpha": 0.003}.
        settings: the checkpoint's config, if it has been read already.
        heads: the number of score heads of a reward model; None for as many as the checkpoint has, or one if it has
            none.
        weights: "meta" builds the model on the meta device, "placeholders" with zeros that take no memory, except for
            the score head, which is read, or is new as it would be otherwise.
        quantization: quantise linear layers and routed experts while they are read.

    Raises:
        ModelError: an unknown or invalid setting, tensors that are missing, unexpected or misshapen, or weights that
            cannot be quantised.
    """
    settings = apply_settings(copy.deepcopy(settings) or read_settings(base), head, config, heads)
    check_generation(base, settings.vocab_size)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    cls = model_class(settings, head)
    given = {"dtype": dtype, "attn_implementation": attn_implementation, "quantization": quantization}
    if weights != "read":
        settings._name_or_path = base
        without_extra_layers(settings)
        with torch.device("meta"):
            model = cls._from_config(settings, **given)
        if model.can_generate():
            with suppress(OSError):  # there is none, and the one made from the config stays
                model.generation_config = GenerationConfig.from_pretrained(base)
        return model if weights == "meta" else with_placeholders(model, base)
    return cls.from_pretrained(base, config=settings, **given)


def with_placeholders(model: PreTrainedModel, base: str) -> PreTrainedModel:
    """Give a model on the meta device the weights of `load_base(weights="placeholders")`."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
    head: Any = getattr(model, "score", None)
    if head is not None:
        head.weight = nn.Parameter(torch.empty_like(head.weight, memory_format=torch.contiguous_format))
        if (saved := read_tensor(base, "score.weight")) is None:
            model._init_weights(head)
        else:
            head.weight.data.copy_(saved)
    return model


def read_tensor(base: str, name: str) -> torch.Tensor | None:
    """A tensor of a model directory or hub name; None if it has none of this name."""
    path = next((path for path, infos in base_headers(base_directory(base)).items() if name in infos), None)
    if path is None:
        return None
    with safe_open(path, "pt") as file:
        return check_finite(name, file.get_tensor(name), base)


def load_model(
    source: ModelSource,
    *,
    head: Head = "causal_lm",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    config: Mapping[str, Any] | None = None,
    on: PreTrainedModel | PeftModel | None = None,
    quantization: Quantization | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a model with its adapter, frozen and in evaluation mode.

    on: a model whose base is this one's, too (see `reason_not_to_share`): its weights are used, and none are loaded.
    quantization: as in `load_base`.
    """
    settings = with_labels(source.settings, source.adapter.header) if source.adapter else source.settings
    if on is not None:
        model: Any = model_on_base(on, apply_settings(copy.deepcopy(settings), head, config), head, attn_implementation)
    else:
        model = load_base(source.base, head, dtype, attn_implementation, config, settings, quantization=quantization)
    if source.adapter:
        model = load_adapter(model, source.adapter, trainable=False, task_type=TASKS[head])
    return model.requires_grad_(False).eval()


def load_lm_head(source: ModelSource, dtype: str = "float32", attn_implementation: str | None = None) -> nn.Module:
    """Load only the frozen language-model head, by reading a single tensor of the base. If an adapter changes the
    embeddings or the head, the whole model is loaded temporarily.

    Raises:
        ModelError: the tensor is missing, has another shape or is not finite.
    """
    if source.adapter and any("embed_tokens" in name or "lm_head" in name for name in source.adapter.header):
        model: Any = load_model(source, dtype=dtype, attn_implementation=attn_implementation)
        return model.get_output_embeddings()
    config, base = source.settings, base_directory(source.base)
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    if (weight := read_tensor(source.base, name)) is None:
        raise ModelError(f"{base}: {name} is missing")
    if weight.shape != (config.vocab_size, config.hidden_size):
        raise ModelError(f"{base}: {name} is {tuple(weight.shape)}, not {(config.vocab_size, config.hidden_size)}")
    head = Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
    head.weight = nn.Parameter(weight.to(getattr(torch, dtype)), requires_grad=False)
    return head


def merge_into(source: ModelSource, out_dir: Path, dtype: str) -> str:
    """Write the base with the adapter merged to out_dir, unless out_dir exists. Returns out_dir.

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
    weights: Weights = "read",
    quantization: Quantization | None = None,
    reference: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a model for a trainer. Trainable weights are float32; `dtype` is that of frozen weights.

    If the source is an adapter with the same targets, ranks and experts, its training continues. Otherwise, and for
    full fine-tuning, it is first merged into `merge_dir`.

    Args:
        experts: the routed experts to train; without LoRA everything else is frozen.
        heads: the number of score heads of a reward model, as in `load_base`.
        router: whether full fine-tuning trains the routers.
        weights: as in `load_base`; adapters are on the meta device too, or as they would be otherwise.
        quantization: as in `load_base`; of the frozen weights below adapters.
        reference: whether an adapter gets a frozen copy (`add_reference`).

    Raises:
        ModelError: as `load_base` and `merge_into`.
    """
    if quantization is not None and lora is None:
        raise ModelError(f"quantization {quantization} is for training adapters: all weights cannot be trained in it")
    lora_config = of_its_attention(lora.config(TASKS[head]), source.settings) if lora else None
    if source.adapter and not (lora_config and continues(source.adapter, lora_config, experts, source.settings)):
        source = ModelSource(merge_into(source, merge_dir, dtype))
    frozen_dtype = dtype if lora or experts else "float32"
    model: Any = load_base(
        source.base, head, frozen_dtype, attn_implementation, config, source.settings, heads, weights, quantization
    )
    if lora_config is None or lora is None:
        if experts is not None:
            train_chosen_experts(model, experts)
            train_in_float32(model)
        elif not router:
            freeze_routers(model)
        return model.train()
    if source.adapter and weights != "meta":
        adapted = load_adapter(model, source.adapter, True, lora.dropout, TASKS[head], experts)
    else:
        adapted = apply_lora(model, lora_config, experts=experts)
        if source.adapter and source.adapter.has_biases:
            mark_as_own(adapted)
    if reference:
        add_reference(adapted)
    return adapted.train()


def freeze_routers(model: nn.Module) -> None:
    """Freeze the routers' weights only."""
    for module in model.modules():
        if isinstance(module, DeepseekV2Router):
            module.requires_grad_(False)


def save_directory(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, out_dir: Path, dtype: str | None = None
) -> None:
    """Write a model (hub layout) or an adapter (PEFT's layout) with its tokenizer, atomically.

    Raises:
        ModelError: out_dir exists and is not empty, its disk is full, or it cannot be written.
    """
    with whole_directory(out_dir) as temporary:
        write_model(model, tokenizer, temporary, dtype)


def write_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: str | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the files of `save_directory` into an existing directory. RL's reference adapter ("ref") is left out.

    state: the model's state, or of an adapter its factors, where the model itself has only a part of it.
    """
    if isinstance(model, PeftModel):
        # "auto" would have the same effect, but with a warning if embeddings are adapted.
        save_embeddings = True if adapts_embeddings(model) else "auto"
        given: dict[str, Any] = {} if state is None else {"state_dict": state}
        model.save_pretrained(
            str(directory),
            save_embedding_layers=save_embeddings,
            selected_adapters=["default"],
            **given,
        )
        save_biases(model, directory)
        (directory / MODEL_CARD).unlink(missing_ok=True)  # PEFT's own has nothing filled in but a local path
    else:
        if dtype is not None:
            torch_dtype, values = getattr(torch, dtype), model.state_dict() if state is None else state
            state = {
                name: tensor.to(dtype_on_disk(name, torch_dtype)) if tensor.is_floating_point() else tensor
                for name, tensor in values.items()
            }
        model.save_pretrained(str(directory), state_dict=None if state is None else dict(state))
        if dtype is not None:
            path = directory / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, directory)
    save_end_token(model, tokenizer, directory)
