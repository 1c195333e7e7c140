"""Loads and saves adapters strictly: missing or unexpected tensors are errors."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..checkpoints.adapter_config import CONFIG
from ..checkpoints.finite import check_finite
from ..checkpoints.sources import AdapterSource, read_adapter
from ..checkpoints.strict import name_some
from ..configuration import DeepseekV2Config
from ..errors import ModelError
from ..esft.choice import ExpertChoice
from .chosen_experts import chosen_in, train_chosen_adapters
from .layouts import Shapes, is_transposed, low_rank_pairs, refuse_per_expert, untranspose, untranspose_shapes
from .lora import set_dropout, train_in_float32, wrap

_PLAIN = (bool, str, list, dict)


def read_lora(source: AdapterSource) -> LoraConfig:
    """adapter_config.json as PEFT reads it. Raises ModelError for unusable values."""
    path = source.directory / CONFIG
    for name, hint in _types_of_fields().items():
        if not fits(value := source.config.get(name), hint):
            raise ModelError(f"{path}: {name} is {value!r}; {_named(hint)}")
    try:
        return LoraConfig.from_pretrained(str(source.directory))  # pyright: ignore[reportReturnType]
    except Exception as error:  # the file can be wrong in more ways than the library has errors for
        raise ModelError(f"{path}: PEFT cannot read it ({' '.join(str(error).split())})") from error


@cache
def _types_of_fields() -> dict[str, Any]:
    return get_type_hints(LoraConfig)


def _named(hint: Any) -> str:
    if fits(["a"], hint):
        return "it must be a list of names"
    return f"PEFT takes {str(hint).replace('typing.', '')}"


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON can be of a type: a data class is an object, null fits everywhere, and one kind of number
    is as good as the other."""
    origin, inner = get_origin(hint), get_args(hint)
    if value is None or hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) for each in inner)  # PEFT looks at the word; it knows pissa_niter_16
    if origin in (list, tuple, set):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if hint in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if is_dataclass(hint):
        return isinstance(value, dict)
    return hint not in _PLAIN or isinstance(value, hint)


def wrap_saved(model: PreTrainedModel, config: LoraConfig, where: Path) -> PeftModel:
    """`wrap`, with a config from the adapter in `where`. Raises ModelError where PEFT cannot use it."""
    try:
        return wrap(model, config)
    except (ModelError, OSError, MemoryError):
        raise
    except Exception as error:  # the file can be wrong in more ways than the library has errors for
        raise ModelError(f"{where / CONFIG}: PEFT cannot use it ({' '.join(str(error).split())})") from error


def continues(
    source: AdapterSource, wanted: LoraConfig, experts: ExpertChoice | None, settings: DeepseekV2Config
) -> bool:
    """Whether a saved adapter has the targets, ranks and scaling of the wanted one, and was trained on the wanted
    routed experts; None wants all of them."""
    numbers = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    lists = ("target_modules", "target_parameters")
    same = all((source.config.get(field) or 0) == (getattr(wanted, field) or 0) for field in numbers) and all(
        set(source.config.get(field) or ()) == set(getattr(wanted, field) or ()) for field in lists
    )
    if not same:
        return False
    count = settings.n_routed_experts or 0
    trained = chosen_in(source, count)
    return trained == (dict(experts.layers) if experts else dict.fromkeys(trained, tuple(range(count))))


def adapts_embeddings(model: PeftModel) -> bool:
    """Whether the embeddings or the lm_head have adapters: PEFT saves their own weights beside these."""
    base: Any = model.get_base_model()
    return any(isinstance(layer, LoraLayer) for layer in (base.get_input_embeddings(), base.get_output_embeddings()))


def saved_tensors(model: PeftModel, source: AdapterSource | None = None) -> dict[str, torch.Tensor]:
    """What PEFT saves of the model's adapter; whole embeddings too where they are adapted, or the source has them."""
    whole = adapts_embeddings(model)
    if source is not None and "embed_tokens" not in (source.config.get("modules_to_save") or ()):
        whole = whole or any(name.endswith("embed_tokens.weight") for name in source.header)
    return get_peft_model_state_dict(model, save_embedding_layers=whole)


def read_tensors(source: AdapterSource) -> dict[str, torch.Tensor]:
    """All tensors of an adapter. Raises ModelError when numbers are not finite."""
    tensors = load_file(source.weights)
    for name, tensor in tensors.items():
        check_finite(name, tensor, source.directory)
    return tensors


def check_coverage(wanted: Shapes, tensors: Shapes, where: str | Path, head: str = "") -> None:
    """Raises ModelError unless the file's tensors (name -> shape) are exactly those wanted: what PEFT saves.

    head: prefix of names that may be missing in the file (the new score head of a reward model).
    """
    missing = {k for k in set(wanted) - set(tensors) if not (head and head in k)}
    unexpected = set(tensors) - set(wanted)
    misshapen = {k for k in set(wanted) & set(tensors) if wanted[k] != tuple(tensors[k])}
    faults = [
        f"{what}: {name_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if faults:
        raise ModelError(f"{where}: the adapter does not fit this model; tensors " + "; tensors ".join(faults))


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def load_adapter(
    model: PreTrainedModel,
    directory: str | Path | AdapterSource,
    trainable: bool = False,
    dropout: float = 0.0,
    task_type: str | None = None,
    experts: ExpertChoice | None = None,
) -> PeftModel:
    """The model with the adapter of `directory` on it; what PEFT before 0.19.1 wrote is converted.

    directory: or what `read_adapter` found there.
    trainable: whether the adapter trains; else it is frozen. dropout: at run time, as `apply_lora` has it.
    task_type: turns e.g. an SFT adapter into the start of a reward model's (SEQ_CLS), with a new score head.
    experts: those that the adapter was trained on, and is trained on again.

    Raises:
        ModelError: a tensor of the file has no place in the model, or the other way round, numbers that are not
            finite, a file cut short, or an adapter with a pair for each expert (`dsv2 import` converts it).
    """
    source = directory if isinstance(directory, AdapterSource) else read_adapter(directory)
    refuse_per_expert(source.header, source.config, source.directory)
    config: Any = read_lora(source)
    kept_task = task_type is None or source.config.get("task_type") == task_type
    config.task_type = task_type or source.config.get("task_type")
    config.inference_mode = not trainable
    if not kept_task:
        config.modules_to_save = None
    peft_model = wrap_saved(model, config, source.directory)
    if experts is not None:
        train_chosen_adapters(peft_model, experts)
    places = saved_tensors(peft_model, source)
    wanted, saved = shapes_of(places), source.shapes
    pairs = low_rank_pairs(peft_model)
    transposed = is_transposed(pairs, saved, wanted, source.config, source.directory)
    saved = untranspose_shapes(pairs, saved) if transposed else saved
    check_coverage(wanted, saved, source.directory, head="" if kept_task else "score")
    tensors = read_tensors(source)
    tensors = untranspose(pairs, tensors) if transposed else tensors
    fresh_head = {k: v for k, v in places.items() if k not in tensors}
    set_peft_model_state_dict(peft_model, tensors | fresh_head)
    train_in_float32(peft_model)
    set_dropout(peft_model, dropout)
    return peft_model  # pyright: ignore[reportReturnType]
