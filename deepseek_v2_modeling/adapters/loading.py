"""Loads and saves adapters so that every tensor finds a place and every place a tensor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..checkpoints.finite import check_finite
from ..checkpoints.tensor_files import read_header
from ..config_values import check_settings_finite
from ..errors import ModelError
from ..esft.choice import ExpertChoice
from .chosen_experts import train_chosen_adapters
from .layouts import is_transposed, low_rank_pairs, refuse_per_expert, untranspose
from .lora import PROJECTIONS, set_dropout, train_in_float32, wrap
from .patterns import check_patterns

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_RANK = 100_000  # beyond any weight's size
EMBEDDINGS = {suffix for name in ("embeddings", "lm_head") for suffix in PROJECTIONS[name].modules}


def is_adapter(directory: str | Path) -> bool:
    return (Path(directory) / CONFIG).is_file()


def read_adapter_config(directory: str | Path) -> dict:
    """adapter_config.json. Raises ModelError when it, or the weights beside it, cannot be used."""
    path = Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable adapter config ({error})") from error
    try:
        check_settings_finite(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise ModelError(f"{path}: base_model_name_or_path is {config['base_model_name_or_path']!r}; it must be a name")
    check_patterns(config, str(path))
    check_ranks(config, str(path))
    if not (Path(directory) / WEIGHTS).is_file():
        raise ModelError(f"{directory}: no {WEIGHTS}; only safetensors adapters are read")
    return config


def read_lora(directory: str | Path) -> LoraConfig:
    """adapter_config.json as PEFT reads it. Raises ModelError for values that are of no use."""
    raw = read_adapter_config(directory)
    path = Path(directory) / CONFIG
    for name in ("target_modules", "target_parameters"):
        value = raw.get(name)
        if not (value is None or isinstance(value, str) or _is_texts(value)):
            raise ModelError(f"{path}: {name} is {value!r}; it must be a list of names")
    try:
        return LoraConfig.from_pretrained(str(directory))  # pyright: ignore[reportReturnType]
    except Exception as error:  # the file can be wrong in more ways than the library has errors for
        raise ModelError(f"{path}: PEFT cannot read it ({' '.join(str(error).split())})") from error


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def check_ranks(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError for ranks and alphas, of all targets or of one, that PEFT would fail over."""
    for field, of_one in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config.get(of_one)
        if not isinstance(patterns, Mapping | None):
            raise ModelError(f"{where}: {of_one} is {patterns!r}: it must be an object of patterns with their values")
        values = {field: config[field]} if field in config else {}
        values |= {f"{of_one}.{pattern}": value for pattern, value in (patterns or {}).items()}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int if field == "r" else int | float):
                raise ModelError(f"{where}: {name} is {value!r}: it must be a number")
            if field == "r" and not 1 <= value <= LARGEST_RANK:
                raise ModelError(f"{where}: {name} is {value}: a rank is from 1 to {LARGEST_RANK:,}")


def saves_embeddings(model: PeftModel, adapter: str = "default") -> bool | Literal["auto"]:
    """PEFT's `save_embedding_layers`: what it chooses by itself, but where these are adapted without a warning."""
    targets = model.peft_config[adapter].target_modules or ()  # pyright: ignore[reportAttributeAccessIssue]
    return True if EMBEDDINGS & set(targets) else "auto"


def saved_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT saves of the model's adapter."""
    return get_peft_model_state_dict(model, save_embedding_layers=saves_embeddings(model))


def read_tensors(directory: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of an adapter. Raises ModelError when the file is cut short, or numbers are not finite."""
    path = Path(directory) / WEIGHTS
    read_header(path)
    return {name: check_finite(name, tensor, directory) for name, tensor in load_file(path).items()}


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _name_some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_coverage(model: PeftModel, tensors: dict[str, tuple[int, ...]], where: str, head: str = "") -> None:
    """Raises ModelError unless the file's tensors (name -> shape) are exactly those of the model's adapter.

    head: prefix of names that may be missing in the file (the new score head of a reward model).
    """
    wanted = _shapes(saved_tensors(model))
    missing = {k for k in set(wanted) - set(tensors) if not (head and head in k)}
    unexpected = set(tensors) - set(wanted)
    misshapen = {k for k in set(wanted) & set(tensors) if wanted[k] != tuple(tensors[k])}
    faults = [
        f"{what}: {_name_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if faults:
        raise ModelError(f"{where}: the adapter does not fit this model; tensors " + "; tensors ".join(faults))


def load_adapter(
    model: PreTrainedModel,
    directory: str | Path,
    trainable: bool = False,
    dropout: float = 0.0,
    task_type: str | None = None,
    experts: ExpertChoice | None = None,
) -> PeftModel:
    """The model with the adapter of `directory` on it; what PEFT before 0.19.1 wrote is converted.

    trainable: whether the adapter trains; else it is frozen. dropout: at run time, as `apply_lora` has it.
    task_type: turns e.g. an SFT adapter into the start of a reward model's (SEQ_CLS), with a new score head.
    experts: those that the adapter was trained on, and is trained on again.

    Raises:
        ModelError: a tensor of the file has no place in the model, or the other way round, numbers that are not
            finite, a file cut short, or an adapter with a pair for each expert (`dsv2 import` converts it).
    """
    raw = read_adapter_config(directory)
    tensors = read_tensors(directory)
    refuse_per_expert(tensors, raw, directory)
    config: Any = read_lora(directory)
    kept_task = task_type is None or raw.get("task_type") == task_type
    config.task_type = task_type or raw.get("task_type")
    config.inference_mode = not trainable
    if not kept_task:
        config.modules_to_save = None
    peft_model = wrap(model, config)
    if experts is not None:
        train_chosen_adapters(peft_model, experts)
    places = saved_tensors(peft_model)
    pairs = low_rank_pairs(peft_model)
    if is_transposed(pairs, _shapes(tensors), _shapes(places), raw, directory):
        tensors = untranspose(pairs, tensors)
    check_coverage(peft_model, _shapes(tensors), str(directory), head="" if kept_task else "score")
    fresh_head = {k: v for k, v in places.items() if k not in tensors}
    set_peft_model_state_dict(peft_model, tensors | fresh_head)
    train_in_float32(peft_model)
    set_dropout(peft_model, dropout)
    return peft_model  # pyright: ignore[reportReturnType]
