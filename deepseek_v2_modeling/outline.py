"""A model's structure, built from its config alone, to check it before any weights are read."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping

from .checkpoints.sources import Head
from .checkpoints.strict import match_sources
from .checkpoints.tensor_files import base_headers
from .configuration import OF_EXPERTS, OF_LATENTS, DeepseekV2Config, check_config, check_sizes
from .errors import ModelError
from .layers.quantization import Quantization, quantize_layers
from .model_classes import model_class


def apply_settings(
    settings: DeepseekV2Config, head: Head, config: Mapping[str, Any] | None, heads: int | None = None
) -> DeepseekV2Config:
    """Apply the overrides of a recipe's `model.config` to the settings, in place, and return them.

    heads: the number of score heads of a reward model; None for the number in its config (`reward_heads`, which is only
        set if there are several).

    Raises:
        ModelError: an override is unknown or has an invalid value.
    """
    if head == "score":
        heads = heads or getattr(settings, "reward_heads", 1)
        if type(heads) is not int or heads < 1:
            raise ModelError(
                f"{settings.name_or_path}/config.json: reward_heads must be a number from 1, not {heads!r}"
            )
        settings.__dict__.pop("reward_heads", None)
        if heads > 1:
            settings.reward_heads = heads
    changes = {**({"num_labels": heads} if head == "score" else {}), **(config or {})}
    if not changes:
        return settings
    if unknown := [key for key in changes if not hasattr(settings, key)]:
        raise ModelError(f'model.config: {settings.architecture} has no setting "{unknown[0]}"')
    try:
        check_sizes(changes)
        for key, value in changes.items():
            setattr(settings, key, value)
        check_config(settings)
    except (ModelError, StrictDataclassError) as error:
        raise ModelError(f"model.config: {' '.join(str(error).split())}") from error
    _check_effects(settings, changes)
    return settings


def _check_effects(settings: DeepseekV2Config, changes: Mapping[str, Any]) -> None:
    """Raise ModelError for a change of what the model has not."""
    for has, keys, why in (
        (settings.has_routed_experts, OF_EXPERTS, "no routed experts"),
        (settings.uses_latents, OF_LATENTS, "no latent attention"),
    ):
        if idle := [key for key in keys if not has and changes.get(key)]:
            raise ModelError(f"model.config: {idle[0]} is {changes[idle[0]]}: the model has {why}; leave it out")


def meta_model(settings: DeepseekV2Config, head: Head, quantization: Quantization | None = None) -> Any:
    """The model on the meta device, without weights. Raises ModelError if the settings cannot be built into a model, or
    it cannot be quantised so."""
    try:
        with torch.device("meta"):
            model = model_class(settings, head)(settings)
    except Exception as error:  # an unknown hidden_act, a pad_token_id outside the vocabulary, ...
        raise ModelError(
            f"{settings.name_or_path}/config.json: it cannot be built into a model ({type(error).__name__}: {error})"
        ) from error
    if quantization is not None:
        quantize_layers(model, quantization)
    return model


def check_weights(base: str, settings: DeepseekV2Config, head: Head) -> None:
    """Check the tensors of a model directory against the model as loading does, but from the file headers alone.

    Raises:
        ModelError: a file is missing or truncated, or tensors are missing, unexpected or have wrong shapes.
    """
    infos = {name: info for header in base_headers(Path(base)).values() for name, info in header.items()}
    match_weights(base, meta_model(settings, head), infos)


def match_weights(base: str, model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """{parameter: tensor, or those of its experts} of a model directory; checked as by `check_weights`. tensors: the
    entries of its headers, or slices of its files."""
    mapping = get_model_conversion_mapping(model)
    wanted = SimpleNamespace(weight_mapping=mapping, ignore_mismatched_sizes=False, pretrained_model_name_or_path=base)
    return match_sources(model, tensors, wanted, by_parameter=True)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, settings: DeepseekV2Config, source: str) -> None:
    """Raise ModelError if the tokenizer has ids that are outside the model's embeddings."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= settings.vocab_size:
        raise ModelError(
            f"{source}: the tokenizer has ids up to {largest:,}, and the model's embeddings have "
            f"{settings.vocab_size:,} rows (vocab_size in config.json); use the model's own tokenizer"
        )
