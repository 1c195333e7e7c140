"""Matches an adapter on disk to its base, tensor by tensor, without reading the weights of either.

The mapping comes from PEFT itself: the base is built on the meta device and wrapped as for loading, and names, shapes
and scalings are taken from the wrapped model.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open

from ..checkpoints.adapter_config import WEIGHTS
from ..checkpoints.finite import check_finite
from ..checkpoints.hub_layout import Piece, Shape, hub_layout
from ..checkpoints.sources import AdapterSource, Head, ModelSource, resolve_source
from ..checkpoints.tensor_files import TensorInfo
from ..configuration import DeepseekV2Config
from ..errors import ModelError
from ..outline import meta_model
from .layouts import (
    FactorPair,
    hub_name,
    is_transposed,
    low_rank_pairs,
    refuse_per_expert,
    transpose_pair,
    untranspose_shapes,
)
from .loading import check_coverage, read_lora, saved_tensors, shapes_of, wrap_saved
from .lora import wrap

# Fields of adapter_config.json that change the meaning of factor pairs, and their neutral values.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # others change the base's weights
    **dict.fromkeys(
        (
            "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "trainable_token_indices",
            "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
        ),
        (None, False, {}, []),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class AdapterFiles:
    """A checked adapter directory, or the directory of a full model, which has no pairs and replaces nothing.

    pairs: the factor pairs. replaced: {hub tensor: tensor of the file} of whole tensors, e.g. a score head or
    embeddings. parameters: {name: shape} of the model. layout: the piece of a parameter that each tensor in the hub's
    layout holds. head: a key of `model_classes.PARTS`.
    """

    directory: Path
    base: str
    config: Mapping[str, Any]
    model_config: DeepseekV2Config
    head: Head
    pairs: tuple[FactorPair, ...]
    replaced: Mapping[str, str]
    infos: Mapping[str, TensorInfo]
    parameters: Mapping[str, Shape]
    layout: Mapping[str, Piece]
    transposed: bool

    @property
    def weights(self) -> Path:
        return self.directory / WEIGHTS

    @cached_property
    def fused(self) -> dict[str, list[str]]:
        """{parameter: hub names of its pieces} for the fused parameters, which are those of the routed experts."""
        names: dict[str, list[str]] = {}
        for name, piece in self.layout.items():
            if piece.place:
                names.setdefault(piece.parameter, []).append(name)
        return names


class FactorReader:
    """Reads tensors of an open adapter on demand, as views of the mapped file, and converts transposed ones."""

    def __init__(self, adapter: AdapterFiles, file: Any):
        self.adapter, self.file = adapter, file
        self.latest: dict[FactorPair, tuple[torch.Tensor, torch.Tensor]] = {}

    def tensor(self, name: str) -> torch.Tensor:
        return check_finite(name, self.file.get_tensor(name), self.adapter.directory)

    def factors(self, pair: FactorPair) -> tuple[torch.Tensor, torch.Tensor]:
        """(down, up) as from `FactorPair.factors`."""
        if pair not in self.latest:  # cached, since a layer's experts use the same two pairs in turn
            a, b = self.tensor(pair.a), self.tensor(pair.b)
            if pair.experts and self.adapter.transposed:
                a, b = transpose_pair(a, b, pair.experts)
            if len(self.latest) > 1:
                self.latest.pop(next(iter(self.latest)))
            self.latest[pair] = pair.factors(a, b)
        return self.latest[pair]


@contextlib.contextmanager
def open_factors(adapter: AdapterFiles) -> Iterator[FactorReader]:
    """Context manager that opens the adapter's file, if there is one."""
    whole_model = not (adapter.pairs or adapter.replaced)
    with contextlib.nullcontext() if whole_model else safe_open(adapter.weights, "pt") as file:
        yield FactorReader(adapter, file)


def meta_adapter(
    model: Any, lora: LoraConfig, source: AdapterSource | None = None
) -> tuple[PeftModel, dict[str, Shape]]:
    """(a model on the meta device, now wrapped, {name: shape} of the tensors that PEFT would save)."""
    lora = copy.deepcopy(lora)  # PEFT writes into it
    lora.init_lora_weights = False
    lora.base_model_name_or_path = None
    with torch.device("meta"):
        peft_model = wrap_saved(model, lora, source.directory) if source else wrap(model, lora)
        return peft_model, shapes_of(saved_tensors(peft_model, source))


def refuse_variants(source: AdapterSource) -> None:
    """Raise ModelError for LoRA variants, whose factor pairs have another meaning than in plain LoRA."""
    for field, allowed in PLAIN.items():
        if source.config.get(field) not in allowed:
            raise ModelError(
                f"{source.directory}/adapter_config.json: {field} is {source.config[field]!r}; use PEFT itself"
            )


def read_plain_lora(source: AdapterSource) -> LoraConfig:
    """`read_lora`, which also raises ModelError for other kinds of adapters."""
    if source.config.get("peft_type") != "LORA":
        raise ModelError(f"{source.directory}: peft_type is {source.config.get('peft_type')}; only LORA is supported")
    return read_lora(source)


def with_labels(settings: DeepseekV2Config, infos: Mapping[str, TensorInfo]) -> DeepseekV2Config:
    """A copy of the settings, with the number of labels of the score head among these tensors, if any."""
    settings = copy.deepcopy(settings)
    score = next((info for name, info in infos.items() if hub_name(name) == "score.weight"), None)
    if score is not None:
        settings.num_labels = heads = score.shape[0]
        if heads > 1:
            settings.reward_heads = heads
    return settings


def match_adapter(source: AdapterSource, settings: DeepseekV2Config) -> tuple[list[FactorPair], bool]:
    """(factor pairs, whether they are transposed) of an adapter on a model with these settings, from its header.

    Raises:
        ModelError: the adapter is in another layout, or its tensors do not match the model one to one.
    """
    pairs, transposed, _ = _match(source, with_labels(settings, source.header))
    return pairs, transposed


def _match(source: AdapterSource, settings: DeepseekV2Config) -> tuple[list[FactorPair], bool, dict[str, Shape]]:
    """`match_adapter` with settings that have the adapter's labels; also {name: shape} of the model's parameters."""
    lora = read_plain_lora(source)
    refuse_per_expert(source.header, source.config, source.directory)
    model = meta_model(settings, source.head)
    parameters = shapes_of(model.state_dict())
    peft_model, expected = meta_adapter(model, lora, source)
    pairs = low_rank_pairs(peft_model)
    shapes = shapes_of(source.header)
    transposed = is_transposed(pairs, shapes, expected, source.config, source.directory)
    shapes = untranspose_shapes(pairs, shapes) if transposed else shapes
    check_coverage(expected, shapes, source.directory)
    return pairs, transposed, parameters


def open_adapter(path: str | Path) -> AdapterFiles:
    """Read the headers of an adapter (or a run's) and the config of its base, and check that they match.

    Raises:
        ModelError: there is no adapter or base, the adapter is in another layout, or its tensors do not match the model
            one to one.
    """
    model = resolve_source(path)
    if model.adapter is None:
        raise ModelError(f"{path}: not an adapter (there is no adapter_config.json), but already a full model")
    return adapter_files(model.adapter, model, path)


def adapter_files(source: AdapterSource, model: ModelSource, path: str | Path) -> AdapterFiles:
    """`open_adapter` of what `path` has been resolved to."""
    refuse_variants(source)
    settings = with_labels(model.settings, source.header)
    pairs, transposed, parameters = _match(source, settings)
    layout = hub_layout(parameters)
    factors = {name for pair in pairs for name in (pair.a, pair.b)}
    replaced = {hub_name(name): name for name in source.header if name not in factors}
    if unknown := [name for name in replaced if name not in layout]:
        raise ModelError(f"{path}: {replaced[unknown[0]]} is neither a LoRA factor nor a tensor of the model")
    if settings.tie_word_embeddings and {pair.parameter for pair in pairs} & {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }:
        raise ModelError(f"{path}: it adapts embeddings that the base ties to its lm_head; they would differ")
    return AdapterFiles(
        directory=source.directory,
        base=model.base,
        config=source.config,
        model_config=settings,
        head=source.head,
        pairs=tuple(pairs),
        replaced=replaced,
        infos=source.header,
        parameters=parameters,
        layout=layout,
        transposed=transposed,
    )
