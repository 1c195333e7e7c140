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
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel
from safetensors import safe_open

from ..checkpoints.finite import check_finite
from ..checkpoints.hub_names import is_hub_name
from ..checkpoints.strict import Piece, Shape, hub_layout
from ..checkpoints.tensor_files import TensorInfo, read_header
from ..configuration import DeepseekV2Config
from ..errors import ModelError
from ..loading import HEADS, ModelSource, read_settings, resolve_source
from .layouts import (
    LowRank,
    hub_name,
    is_transposed,
    low_rank_pairs,
    refuse_per_expert,
    transpose_pair,
    untranspose_shapes,
)
from .loading import WEIGHTS, check_coverage, read_adapter_config, read_lora, saved_tensors
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
    head: a key of loading.HEADS.
    """

    directory: Path
    base: str
    config: Mapping[str, Any]
    model_config: DeepseekV2Config
    head: str
    pairs: tuple[LowRank, ...]
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
        self.latest: dict[LowRank, tuple[torch.Tensor, torch.Tensor]] = {}

    def tensor(self, name: str) -> torch.Tensor:
        return check_finite(name, self.file.get_tensor(name), self.adapter.directory)

    def factors(self, pair: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        """(down, up) as `LowRank.factors`."""
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


def read_model_config(base: str) -> DeepseekV2Config:
    """`read_settings` of an adapter's base. Raises ModelError when it is not there, or of another model."""
    if not Path(base).is_dir() and not is_hub_name(base):
        raise ModelError(f"{base}: this base model is not there; put it back, or correct base_model_name_or_path")
    return read_settings(base)


def base_directory(base: str) -> Path:
    """The directory of a model's files; a hub name is fetched."""
    if Path(base).is_dir():
        return Path(base)
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(base, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(f"{base}: not to be had from the hub ({str(error).splitlines()[0]})") from error


def head_of(raw: Mapping[str, Any], infos: Mapping[str, TensorInfo], config: DeepseekV2Config) -> str:
    """The key of loading.HEADS that an adapter is for; the config gets as many labels as its score head has."""
    score = next((info for name, info in infos.items() if hub_name(name) == "score.weight"), None)
    if score is not None:
        config.num_labels = score.shape[0]
    return next((name for name, (_, task) in HEADS.items() if task == raw.get("task_type")), "causal_lm")


def model_shapes(config: DeepseekV2Config, head: str) -> dict[str, Shape]:
    """{name: shape} of a model's parameters."""
    with torch.device("meta"):
        model: Any = HEADS[head][0](config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def meta_adapter(config: DeepseekV2Config, lora: LoraConfig, head: str) -> tuple[PeftModel, dict[str, Shape]]:
    """(the base's structure under the adapter, shapes of what PEFT saves of it), without weights."""
    lora = copy.deepcopy(lora)  # PEFT writes into it
    lora.init_lora_weights = False
    lora.base_model_name_or_path = None
    with torch.device("meta"):
        peft_model = wrap(HEADS[head][0](config), lora)
        saved = {name: tuple(tensor.shape) for name, tensor in saved_tensors(peft_model).items()}
    return peft_model, saved


def read_lora_config(directory: Path) -> tuple[dict[str, Any], LoraConfig]:
    """adapter_config.json, as it is and as PEFT reads it.

    Raises:
        ModelError: it cannot be read, or is of a kind of adapter other than plain LoRA.
    """
    raw = read_adapter_config(directory)
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"{directory}: peft_type is {raw.get('peft_type')}; only LORA is known here")
    return raw, read_lora(directory)


def refuse_variants(directory: Path, raw: Mapping[str, Any]) -> None:
    """Raises ModelError for an adapter whose pairs of factors mean something else than in plain LoRA."""
    for field, allowed in PLAIN.items():
        if raw.get(field) not in allowed:
            raise ModelError(f"{directory}/adapter_config.json: {field} is {raw[field]!r}; use PEFT itself for it")


def find_adapter(path: str | Path) -> tuple[ModelSource, Path]:
    """(source, adapter directory) of an adapter or a run. Raises ModelError when it has no adapter."""
    source = resolve_source(path)
    if source.adapter is None:
        raise ModelError(f"{path}: there is no adapter here (adapter_config.json); it is a whole model already")
    return source, Path(source.adapter)


def match_adapter(
    directory: Path, raw: Mapping[str, Any], lora: LoraConfig, config: DeepseekV2Config
) -> tuple[dict[str, TensorInfo], str, list[LowRank], bool]:
    """(tensors, head, pairs, whether they are transposed) of an adapter on a model of this config, from its header.

    Raises:
        ModelError: another layout, or tensors without a place or places without a tensor.
    """
    infos = read_header(directory / WEIGHTS)
    refuse_per_expert(infos, raw, directory)
    head = head_of(raw, infos, config)
    peft_model, wanted = meta_adapter(config, lora, head)
    pairs = low_rank_pairs(peft_model)
    shapes = {name: info.shape for name, info in infos.items()}
    transposed = is_transposed(pairs, shapes, wanted, raw, directory)
    check_coverage(peft_model, untranspose_shapes(pairs, shapes) if transposed else shapes, str(directory))
    return infos, head, pairs, transposed


def open_adapter(path: str | Path) -> AdapterFiles:
    """Reads the headers of an adapter (or a run's) and the config of its base, and checks that they fit.

    Raises:
        ModelError: no adapter, no base, another layout, or tensors without a place or places without a tensor.
    """
    source, directory = find_adapter(path)
    raw, lora = read_lora_config(directory)
    refuse_variants(directory, raw)
    config = read_model_config(source.base)
    infos, head, pairs, transposed = match_adapter(directory, raw, lora, config)
    parameters = model_shapes(config, head)
    layout = hub_layout(parameters)
    factors = {name for pair in pairs for name in (pair.a, pair.b)}
    replaced = {hub_name(name): name for name in infos if name not in factors}
    if unknown := [name for name in replaced if name not in layout]:
        raise ModelError(f"{directory}: {replaced[unknown[0]]} is neither a LoRA factor nor a tensor of the model")
    if config.tie_word_embeddings and {pair.parameter for pair in pairs} & {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }:
        raise ModelError(f"{directory}: it adapts embeddings that the base ties to its lm_head; they would differ")
    return AdapterFiles(
        directory=directory,
        base=source.base,
        config=raw,
        model_config=config,
        head=head,
        pairs=tuple(pairs),
        replaced=replaced,
        infos=infos,
        parameters=parameters,
        layout=layout,
        transposed=transposed,
    )
