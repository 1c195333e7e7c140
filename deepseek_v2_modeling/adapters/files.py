"""An adapter on disk, matched tensor by tensor to its base, without a weight of either being read.

PEFT itself says what belongs where: the base's structure is built on the meta device, wrapped as for loading, and
the names, shapes and scalings are read off it.
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
from ..checkpoints.sources import AdapterSource, Head, resolve_source
from ..checkpoints.tensor_files import TensorInfo
from ..configuration import DeepseekV2Config
from ..errors import ModelError
from ..outline import meta_model, model_shapes
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

# Fields of adapter_config.json that change what a pair of factors means, and the values that do not.
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
    """A checked adapter directory; or a whole model's, which has no pairs and replaces nothing.

    pairs: its factors. replaced: {hub tensor: tensor of the file} kept whole, e.g. a score head or embeddings.
    parameters: the model's, with shapes. layout: what each tensor of the base, in the hub's layout, is to them.
    head: a key of HEADS.
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
        """{parameter: the hub's names of its parts}, for those that have parts: the routed experts."""
        names: dict[str, list[str]] = {}
        for name, piece in self.layout.items():
            if piece.place:
                names.setdefault(piece.parameter, []).append(name)
        return names


class FactorReader:
    """Reads an open adapter's tensors on demand, as views of the mapped file, whatever layout they are in."""

    def __init__(self, adapter: AdapterFiles, file: Any):
        self.adapter, self.file = adapter, file
        self.latest: dict[FactorPair, tuple[torch.Tensor, torch.Tensor]] = {}

    def tensor(self, name: str) -> torch.Tensor:
        return check_finite(name, self.file.get_tensor(name), self.adapter.directory)

    def factors(self, pair: FactorPair) -> tuple[torch.Tensor, torch.Tensor]:
        """(down, up) as `FactorPair.factors`."""
        if pair not in self.latest:  # a layer's experts ask for the same two, one after the other
            a, b = self.tensor(pair.a), self.tensor(pair.b)
            if pair.experts and self.adapter.transposed:
                a, b = transpose_pair(a, b, pair.experts)
            if len(self.latest) > 1:
                self.latest.pop(next(iter(self.latest)))
            self.latest[pair] = pair.factors(a, b)
        return self.latest[pair]


@contextlib.contextmanager
def open_factors(adapter: AdapterFiles) -> Iterator[FactorReader]:
    whole_model = not (adapter.pairs or adapter.replaced)
    with contextlib.nullcontext() if whole_model else safe_open(adapter.weights, "pt") as file:
        yield FactorReader(adapter, file)


def meta_adapter(
    settings: DeepseekV2Config, lora: LoraConfig, head: Head, source: AdapterSource | None = None
) -> tuple[PeftModel, dict[str, Shape]]:
    """(the base's structure under the adapter, shapes of what PEFT saves of it), without weights."""
    lora = copy.deepcopy(lora)  # PEFT writes into it
    lora.init_lora_weights = False
    lora.base_model_name_or_path = None
    with torch.device("meta"):
        model = meta_model(settings, head)
        peft_model = wrap_saved(model, lora, source.directory) if source else wrap(model, lora)
        return peft_model, shapes_of(saved_tensors(peft_model, source))


def refuse_variants(source: AdapterSource) -> None:
    """Raises ModelError for an adapter whose pairs of factors mean something else than in plain LoRA."""
    for field, allowed in PLAIN.items():
        if source.config.get(field) not in allowed:
            raise ModelError(
                f"{source.directory}/adapter_config.json: {field} is {source.config[field]!r}; use PEFT itself"
            )


def read_plain_lora(source: AdapterSource) -> LoraConfig:
    """`read_lora`. Raises ModelError for a kind of adapter other than LoRA, too."""
    if source.config.get("peft_type") != "LORA":
        raise ModelError(f"{source.directory}: peft_type is {source.config.get('peft_type')}; only LORA is supported")
    return read_lora(source)


def with_labels(settings: DeepseekV2Config, infos: Mapping[str, TensorInfo]) -> DeepseekV2Config:
    """A copy of the settings with as many labels as the score head among these tensors has."""
    settings = copy.deepcopy(settings)
    score = next((info for name, info in infos.items() if hub_name(name) == "score.weight"), None)
    if score is not None:
        settings.num_labels = heads = score.shape[0]
        if heads > 1:
            settings.reward_heads = heads
    return settings


def match_adapter(source: AdapterSource, settings: DeepseekV2Config) -> tuple[list[FactorPair], bool]:
    """(pairs, whether they are transposed) of an adapter on a model of these settings, from its header.

    Raises:
        ModelError: another layout, or tensors without a place or places without a tensor.
    """
    lora = read_plain_lora(source)
    refuse_per_expert(source.header, source.config, source.directory)
    peft_model, wanted = meta_adapter(with_labels(settings, source.header), lora, source.head, source)
    pairs = low_rank_pairs(peft_model)
    transposed = is_transposed(pairs, source.shapes, wanted, source.config, source.directory)
    saved = untranspose_shapes(pairs, source.shapes) if transposed else source.shapes
    check_coverage(wanted, saved, source.directory)
    return pairs, transposed


def open_adapter(path: str | Path) -> AdapterFiles:
    """Reads the headers of an adapter (or a run's) and the config of its base, and checks that they fit.

    Raises:
        ModelError: no adapter, no base, another layout, or tensors without a place or places without a tensor.
    """
    model = resolve_source(path)
    source = model.adapter
    if source is None:
        raise ModelError(f"{path}: not an adapter (there is no adapter_config.json), but already a full model")
    refuse_variants(source)
    pairs, transposed = match_adapter(source, model.settings)
    settings = with_labels(model.settings, source.header)
    parameters = model_shapes(settings, source.head)
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
