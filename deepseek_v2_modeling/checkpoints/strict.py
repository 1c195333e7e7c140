"""Strict loading of checkpoints in the hub's layout, reading experts directly into their fused parameters.

Stock transformers reports missing, unexpected and misshapen tensors in a log table and continues with random values;
here they are errors that give their names on disk. Stock also holds the separate experts and the fused parameter in
memory at the same time: 1.7 times the weights if bf16 files are loaded in float32. Here each expert is copied from the
mapped file to its place.
"""

import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..errors import ModelError, ShapeError
from ..layers.quantization import quantization_of, storages, tell_shapes
from .finite import check_weights
from .hub_layout import COMPUTED, Piece, Shape, hub_layout, is_extra_layer, summed_up, without_extra_layers
from .lazy_tensors import SCALES, BlockScaled, FusedExperts, QuantizedSource, with_scales
from .offloading import keep_readable
from .refusals import asked_quantization, check_directory, check_keywords, check_quantization, check_source
from .tensor_files import FLOATS, info_of, open_files

LORA_FACTOR = re.compile(r"\.lora_(?:embedding_)?[AB]\.([^.]+)")  # captures the adapter's name
SHOWN = 5  # names per message


class StrictPreTrainedModel(PreTrainedModel):
    """A PreTrainedModel whose `from_pretrained` rejects checkpoints, and PEFT's loading adapters, that do not fit
    exactly.

    new_heads: prefixes of tensors that may be missing from the checkpoint; they are newly initialised.
    other_heads: prefixes of tensors in the checkpoint that may be left out, such as another model's head.
    A printed line names both. Every other mismatch is an error.
    """

    new_heads: tuple[str, ...] = ()
    other_heads: tuple[str, ...] = ()
    _keys_to_ignore_on_load_unexpected = {COMPUTED}  # noqa: RUF012 - read by transformers

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        use_safetensors: bool | None = None,
        quantization: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like transformers', but strict: only safetensors is read, and tensors and parameters must match one to one.

        quantization: "nf4" or "int8": linear layers and routed experts are quantised while they are read, for training
        adapters. A BitsAndBytesConfig that says the same may be given as `quantization_config`.

        With `ignore_mismatched_sizes=True`, tensors of other shapes are newly initialised and named; an expert of
        another shape is always an error.

        Raises:
            ModelError: the checkpoint is quantised or of another architecture, there are no safetensors files, a file
                cannot be read, or tensors are missing, unexpected, misshapen (a ShapeError) or not finite; the message
                names them. Also if the keywords ask for another quantization or a parallel plan, or a library that
                quantization needs is missing.
        """
        path = pretrained_model_name_or_path
        if use_safetensors is False or kwargs.get("gguf_file"):
            raise ModelError(f"{path}: only safetensors is read")
        quantization = asked_quantization(path, kwargs, quantization)
        if quantization is not None:
            kwargs["quantization"] = quantization
        check_keywords(path, kwargs)
        check_source(cls.config_class, path, kwargs)
        check_directory(path, kwargs.get("subfolder") or "")
        try:
            loaded: Any = super().from_pretrained(path, *args, use_safetensors=True, **kwargs)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: {str(error).splitlines()[0]}") from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_weights(model, path)
        keep_readable(model)
        if quantization is not None:
            tell_shapes(model)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Like transformers'. Raises ModelError for a quantised model, whose files would be of no layout."""
        if (scheme := quantization_of(self)) is not None:
            raise ModelError(
                f"this model is quantised to {scheme}, which is not saved: save its adapter, and merge that into the "
                f"original model, {self.name_or_path}, with deepseek_v2_modeling.merge_lora or dsv2 merge"
            )
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def get_init_context(cls, dtype: torch.dtype, is_quantized: bool, *args: Any, **kwargs: Any) -> Any:
        """Also reject a quantised base of an adapter that transformers was given, which `check_source` cannot see."""
        if is_quantized:
            check_quantization("the base model", {"quant_method": "its own"})
        return super().get_init_context(dtype, is_quantized, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Check the tensors that PEFT loads; torch calls this for the model first, then for each of its modules."""
        check_adapter_tensors(self, {name.removeprefix(prefix) for name in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        """Check names and shapes before the first tensor is read, and give transformers fused experts to load.

        Parameters that are sharded or quantised during loading are left to transformers and checked afterwards; so are
        native adapters, which come with `expected_keys`.
        """
        changed = changes_parameters(load_config)
        if changed and quantization_of(model) is not None:
            raise ModelError(f"{name_of(load_config)}: quantised weights cannot be sharded while they are read")
        if expected_keys is None and not changed:
            with ExitStack() as files:
                sources = state_dict if state_dict is not None else open_files(checkpoint_files or [], files)
                matched = match_sources(model, sources, load_config)
                offloaded = "disk" in (load_config.device_map or {}).values()  # such weights are read again later
                if load_config.disable_mmap or offloaded:
                    refuse_converted(name_of(load_config), matched)
                else:
                    result = PreTrainedModel._load_pretrained_model(model, matched, None, load_config)
                    # Otherwise a model whose experts transformers did not fuse itself would be saved with fused ones.
                    model.__dict__.pop("_weight_conversions", None)
                    return result
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Raise errors for mismatches that transformers only reports, and print the line about heads."""
        with without_report(loading_info):
            PreTrainedModel._finalize_model_loading(
                model, replace(load_config, ignore_mismatched_sizes=True), loading_info
            )
        shapes = {name: (tuple(actual), tuple(expected)) for name, actual, expected in loading_info.mismatched_keys}
        initialised, left_out = judge(
            model, load_config, loading_info.missing_keys, loading_info.unexpected_keys, shapes
        )
        say_heads(name_of(load_config), initialised, left_out, model.config)
        without_extra_layers(model.config)
        return loading_info


def say_heads(where: str, initialised: Collection[str], left_out: Collection[str], config: Any) -> None:
    """Print which tensors are new, and which of the checkpoint are not used, if any; the first process does."""
    notes = [f"newly initialised: {', '.join(initialised)}"] if initialised else []
    if left_out:
        notes.append(f"left out: {', '.join(summed_up(left_out, config))}")
    if notes and os.environ.get("RANK", "0") == "0":
        print(f"{where}: {'; '.join(notes)}")


def name_of(load_config: Any) -> str:
    return str(load_config.pretrained_model_name_or_path or "state_dict")


def judge(
    model: Any,
    load_config: Any,
    missing: Iterable[str],
    unexpected: Iterable[str],
    misshapen: Mapping[str, tuple[Shape, Shape]],
) -> tuple[list[str], list[str]]:
    """(tensors to initialise, tensors to leave out) among those that do not match; misshapen: {name: (shape in the
    checkpoint, shape in the model)}.

    Raises:
        ModelError: a mismatch is not allowed; the message has the first names of each kind.
    """
    lenient = load_config.ignore_mismatched_sizes
    reshaped = {name for name in misshapen if lenient and ".experts." not in name}
    initialised = {name for name in missing if name.startswith(model.new_heads)} | reshaped
    left_out = {n for n in unexpected if n.startswith(model.other_heads) or is_extra_layer(n, model.config)}
    faults = {
        "missing": set(missing) - initialised,
        "unexpected": set(unexpected) - left_out,
        "misshapen": {f"{k} {list(v[0])}, not {list(v[1])}" for k, v in misshapen.items() if k not in reshaped},
    }
    parts = []
    for kind, names in faults.items():
        parts += [f"{kind} tensors: {name_some(names)}"] * bool(names)
    if parts:
        kind = ShapeError if faults["misshapen"] else ModelError
        raise kind(f"{name_of(load_config)}: {'; '.join(parts)}")
    return sorted(initialised), sorted(left_out)


def check_adapter_tensors(model: nn.Module, tensors: set[str]) -> None:
    """Raise ModelError if a state dict with LoRA factors does not match the adapters of the model exactly.

    PEFT's own loading ignores unexpected tensors and leaves missing ones at random values.
    """
    adapters = {factor[1] for name in tensors if (factor := LORA_FACTOR.search(name))}
    parameters = {name for name, _ in model.named_parameters()} if adapters else set()
    if not adapters or any("_fsdp_" in name for name in parameters):  # sharded models have other names
        return
    allowed = parameters | {name for name, _ in model.named_buffers()}
    expected = {name for name in parameters if (factor := LORA_FACTOR.search(name)) and factor[1] in adapters}
    parts = [
        f"{kind} tensors: {name_some(names)}"
        for kind, names in (("missing", expected - tensors), ("unexpected", tensors - allowed))
        if names
    ]
    if parts:
        raise ModelError(
            f"the adapter does not fit this model; {'; '.join(parts)}; deepseek_v2_modeling.load_adapter says more; "
            "convert an adapter with a pair for each expert by: dsv2 import"
        )


def name_some(names: Collection[str]) -> str:
    """The first few names, and the number of further ones."""
    return ", ".join(sorted(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def changes_parameters(load_config: Any) -> bool:
    """Whether parameters are quantised or sharded during loading, which changes names and shapes."""
    quantised, sharded = load_config.hf_quantizer is not None, load_config.device_mesh is not None
    return quantised or sharded or is_deepspeed_zero3_enabled()


def refuse_converted(where: str, sources: Mapping[str, Any]) -> None:
    """Raise ModelError for weights that are fp8, or to be quantised, where transformers itself reads the files."""
    if any(isinstance(source, QuantizedSource) for source in sources.values()):
        raise ModelError(f"{where}: quantised weights cannot be offloaded to disk, or read with disable_mmap")
    experts = (part for source in sources.values() if isinstance(source, FusedExperts) for _, part in source.pieces)
    if any(isinstance(source, BlockScaled) for source in (*sources.values(), *experts)):
        raise ModelError(f"{where}: fp8 weights cannot be offloaded to disk, or read with disable_mmap")


def check_numbers(where: str, dtypes: Mapping[str, str]) -> None:
    """Raise ModelError for tensors that are not floating-point numbers, which are quantised and need scales. dtypes:
    {tensor: code of its dtype}."""
    if wrong := [name for name, dtype in dtypes.items() if dtype not in FLOATS]:
        missing = f" without its scales {wrong[0]}{SCALES}" if dtypes[wrong[0]] == "F8_E4M3" else ""
        raise ModelError(
            f"{where}: {wrong[0]} is stored as {dtypes[wrong[0]]}{missing}: the weights are quantised; name the "
            f"original model, whose weights are one of {', '.join(FLOATS)}"
        )


def match_sources(
    model: Any, sources: Mapping[str, Any], load_config: Any, by_parameter: bool = False
) -> dict[str, Any]:
    """The state dict for transformers to load, with experts under the names of their fused parameters.

    by_parameter: use the model's names for the others too; transformers renames them itself.

    Raises:
        ModelError: names or shapes do not fit.
    """
    where = name_of(load_config)
    sources, stored = with_scales(where, sources), storages(model)
    parameters: dict[str, Shape] = {
        name: stored[name].shape if name in stored else tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    layout = hub_layout(parameters)
    known_names = dict.fromkeys([*parameters, *layout], True)
    renamings = [entry for entry in load_config.weight_mapping or [] if isinstance(entry, WeightRenaming)]
    names = {  # with or without the backbone's prefix, as this class has it
        rename_source_key(name, renamings, [], model.base_model_prefix, known_names)[0]: name for name in sources
    }
    if doubled := sorted(sources.keys() - set(names.values())):
        raise ModelError(f"{where}: tensors stored under two names: {', '.join(doubled[:SHOWN])}")
    if any(name in names and name not in layout for name in parameters):  # experts that are fused on disk too
        layout = hub_layout(parameters, names)
    infos = {name: info_of(sources[key]) for name, key in names.items()}
    check_numbers(where, {key: infos[name].dtype for name, key in names.items() if name in layout})
    check_sources(model, load_config, {name: info.shape for name, info in infos.items()}, layout)
    state: dict[str, Any] = {}
    for name, key in names.items():
        piece = layout.get(name)
        if piece is not None and piece.parameter in stored:
            quantized = state.setdefault(piece.parameter, QuantizedSource(stored[piece.parameter], where))
            quantized.pieces.append((key, piece.place, sources[key]))
        elif piece is None or piece.place is None:
            state[name if by_parameter else key] = sources[key]
        else:
            fused = state.setdefault(piece.parameter, FusedExperts(parameters[piece.parameter]))
            fused.pieces.append((piece.place, sources[key]))
    return state


def check_sources(
    model: Any, load_config: Any, shapes_on_disk: Mapping[str, Shape], layout: Mapping[str, Piece]
) -> None:
    """Raise ModelError unless the tensors of a checkpoint match the layout, except for heads and tied weights."""
    tied = {name: other for pair in model.all_tied_weights_keys.items() for name, other in (pair, pair[::-1])}
    missing = [name for name in layout.keys() - shapes_on_disk.keys() if tied.get(name) not in shapes_on_disk]
    unexpected = [name for name in shapes_on_disk.keys() - layout.keys() if not re.search(COMPUTED, name)]
    shapes = {name: (shapes_on_disk[name], layout[name].shape) for name in layout.keys() & shapes_on_disk.keys()}
    judge(model, load_config, missing, unexpected, {name: pair for name, pair in shapes.items() if pair[0] != pair[1]})


@contextmanager
def without_report(loading_info: Any) -> Iterator[None]:
    """Suppress transformers' log table of mismatches, which are raised or printed here, unless conversions failed."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return bool(loading_info.conversion_errors) or "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
