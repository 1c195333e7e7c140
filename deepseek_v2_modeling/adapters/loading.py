"""Loads adapters strictly: missing or unexpected tensors are errors."""

from collections.abc import Container, Mapping
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
from ..checkpoints.tensor_files import TensorInfo
from ..configuration import DeepseekV2Config
from ..errors import ModelError
from ..esft.choice import ExpertChoice
from .chosen_experts import chosen_in, train_chosen_adapters
from .layouts import Shapes, is_transposed, low_rank_pairs, refuse_per_expert, untranspose, untranspose_shapes
from .lora import set_dropout, train_in_float32, wrap
from .router_biases import mark_as_own, router_biases

_PLAIN = (bool, str, list, dict)


def read_lora(source: AdapterSource) -> LoraConfig:
    """adapter_config.json as a PEFT config. Raises ModelError for invalid values."""
    path = source.directory / CONFIG
    for name, hint in _types_of_fields().items():
        if not fits(value := source.config.get(name), hint):
            raise ModelError(f"{path}: {name} is {value!r}; {_named(hint)}")
    try:
        return LoraConfig.from_pretrained(str(source.directory))  # pyright: ignore[reportReturnType]
    except Exception as error:  # PEFT raises various exceptions for invalid files
        raise ModelError(f"{path}: PEFT cannot read it ({' '.join(str(error).split())})") from error


@cache
def _types_of_fields() -> dict[str, Any]:
    return get_type_hints(LoraConfig)


def _named(hint: Any) -> str:
    if fits(["a"], hint):
        return "it must be a list of names"
    return f"PEFT takes {str(hint).replace('typing.', '')}"


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is valid for a type hint: a data class is an object, null is always valid, and integers and
    floats are interchangeable."""
    origin, inner = get_origin(hint), get_args(hint)
    if value is None or hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, member) for member in inner)
    if origin is Literal:
        return any(type(value) is type(member) for member in inner)  # PEFT also accepts words such as pissa_niter_16
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
    """`wrap` with the config of the adapter in `where`. Raises ModelError if PEFT cannot use it."""
    try:
        return wrap(model, config)
    except (ModelError, OSError, MemoryError):
        raise
    except Exception as error:  # PEFT raises various exceptions for invalid files
        raise ModelError(f"{where / CONFIG}: PEFT cannot use it ({' '.join(str(error).split())})") from error


def continues(
    source: AdapterSource, lora: LoraConfig, experts: ExpertChoice | None, settings: DeepseekV2Config
) -> bool:
    """Whether training can continue from a saved adapter: it has the targets, ranks and scaling of the wanted config,
    and was trained on these routed experts (None: on all)."""
    numbers = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    lists = ("target_modules", "target_parameters")
    same = all((source.config.get(field) or 0) == (getattr(lora, field) or 0) for field in numbers) and all(
        set(source.config.get(field) or ()) == set(getattr(lora, field) or ()) for field in lists
    )
    if not same:
        return False
    count = settings.n_routed_experts or 0
    trained = chosen_in(source, count)
    return trained == (dict(experts.layers) if experts else dict.fromkeys(trained, tuple(range(count))))


def adapts_embeddings(model: PeftModel) -> bool:
    """Whether the embeddings or the lm_head have adapters; PEFT then saves their own weights too."""
    base: Any = model.get_base_model()
    return any(isinstance(layer, LoraLayer) for layer in (base.get_input_embeddings(), base.get_output_embeddings()))


def whole_embeddings(model: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of embeddings and head that an adapter on either of them is saved with; empty for any other."""
    if not adapts_embeddings(model):
        return {}
    base: Any = model.get_base_model()
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    own = {id(getattr(layer, "base_layer", layer).weight) for layer in layers if layer is not None}
    return {name: parameter.detach() for name, parameter in model.named_parameters() if id(parameter) in own}


def saved_tensors(model: PeftModel, source: AdapterSource | None = None) -> dict[str, torch.Tensor]:
    """The tensors that PEFT saves of the model's adapter, with whole embeddings if they are adapted or the source has
    them, and with the biases of routers if it has those."""
    whole = adapts_embeddings(model)
    if source is not None and "embed_tokens" not in (source.config.get("modules_to_save") or ()):
        whole = whole or any(name.endswith("embed_tokens.weight") for name in source.header)
    biases = router_biases(model) if source is not None and source.has_biases else {}
    return {**get_peft_model_state_dict(model, save_embedding_layers=whole), **biases}


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether it is one element expanded to a weight's shape, which stands for a weight that was not read."""
    return not any(tensor.stride())


def fill_placeholders(model: PeftModel, names: Container[str]) -> None:
    """Give those weights of the base memory of their own that an adapter's file holds too, such as embeddings."""
    for name, parameter in model.named_parameters():
        if name in names and is_placeholder(parameter):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def read_tensors(source: AdapterSource) -> dict[str, torch.Tensor]:
    """All tensors of an adapter. Raises ModelError if numbers are not finite."""
    tensors = load_file(source.weights)
    for name, tensor in tensors.items():
        check_finite(name, tensor, source.directory)
    return tensors


def check_coverage(expected: Shapes, tensors: Shapes, where: str | Path, head: str = "") -> None:
    """Raise ModelError unless the file's tensors (name -> shape) are exactly those that PEFT would save (`expected`).

    head: tensors whose names contain this may be missing from the file (the new score head of a reward model).
    """
    missing = {k for k in set(expected) - set(tensors) if not (head and head in k)}
    unexpected = set(tensors) - set(expected)
    misshapen = {k for k in set(expected) & set(tensors) if expected[k] != tuple(tensors[k])}
    faults = [
        f"{fault}: {name_some(names)}"
        for fault, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if faults:
        raise ModelError(f"{where}: the adapter does not fit this model; tensors " + "; tensors ".join(faults))


def shapes_of(tensors: Mapping[str, torch.Tensor] | Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of tensors or a header's entries."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def load_adapter(
    model: PreTrainedModel,
    directory: str | Path | AdapterSource,
    trainable: bool = False,
    dropout: float = 0.0,
    task_type: str | None = None,
    experts: ExpertChoice | None = None,
) -> PeftModel:
    """Wrap the model with the adapter in `directory`; adapters written by PEFT before 0.19.1 are converted.

    Args:
        directory: the adapter's directory, or the result of `read_adapter`.
        trainable: whether the adapter is trained; otherwise it is frozen.
        dropout: run-time dropout, as in `apply_lora`.
        task_type: another task type, e.g. SEQ_CLS to start a reward model from an SFT adapter, with a new score head.
        experts: the routed experts that the adapter was trained on, to continue training on them.

    Raises:
        ModelError: the adapter's tensors and the model do not match one to one, numbers are not finite, the file is
            truncated, or the adapter has separate pairs per expert (`dsv2 import` converts it).
    """
    source = directory if isinstance(directory, AdapterSource) else read_adapter(directory)
    refuse_per_expert(source.header, source.config, source.directory)
    config: Any = read_lora(source)
    same_task = task_type is None or source.config.get("task_type") == task_type
    config.task_type = task_type or source.config.get("task_type")
    config.inference_mode = not trainable
    if not same_task:
        config.modules_to_save = None
    peft_model = wrap_saved(model, config, source.directory)
    if experts is not None:
        train_chosen_adapters(peft_model, experts)
    expected = saved_tensors(peft_model, source)
    expected_shapes, saved_shapes = shapes_of(expected), shapes_of(source.header)
    pairs = low_rank_pairs(peft_model)
    transposed = is_transposed(pairs, saved_shapes, expected_shapes, source.config, source.directory)
    saved_shapes = untranspose_shapes(pairs, saved_shapes) if transposed else saved_shapes
    check_coverage(expected_shapes, saved_shapes, source.directory, head="" if same_task else "score")
    fresh_head = {name: tensor for name, tensor in expected.items() if name not in source.header}
    tensors = read_tensors(source)
    tensors = untranspose(pairs, tensors) if transposed else tensors
    fill_placeholders(peft_model, tensors)
    set_peft_model_state_dict(peft_model, tensors | fresh_head)
    if source.has_biases:
        mark_as_own(peft_model)
    train_in_float32(peft_model)
    set_dropout(peft_model, dropout)
    return peft_model  # pyright: ignore[reportReturnType]
