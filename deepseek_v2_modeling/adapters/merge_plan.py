"""Plans and checks the output of a merge, from the headers of the base and the adapter alone."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..checkpoints.hub_layout import COMPUTED, dtype_on_disk, is_extra_layer, summed_up
from ..checkpoints.lazy_tensors import SCALES, BlockScaled, with_scales
from ..checkpoints.tensor_files import FLOATS, TensorInfo, base_headers, shard_names, split_by_size
from ..errors import ModelError
from .files import AdapterFiles
from .layouts import FactorPair

OTHER_HEAD = {"causal_lm": "score.", "score": "lm_head."}
SHOWN = 5


@dataclass(frozen=True)
class Merged:
    """One tensor of the result: tensor `source` of a file of the base (or of the adapter), indexed with [place], plus
    the product of a factor pair. scales: the file and the name of its scales if it is an fp8 weight."""

    info: TensorInfo
    file: Path
    source: str
    place: Any = ...
    pair: FactorPair | None = None
    from_adapter: bool = False
    scales: tuple[Path, str] | None = None


@dataclass(frozen=True)
class Shard:
    """A file of the result, and the files of the base that its tensors come from."""

    name: str
    tensors: Mapping[str, Merged]

    @property
    def sources(self) -> list[Path]:
        return list(dict.fromkeys(merged.file for merged in self.tensors.values() if not merged.from_adapter))

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: merged.info for name, merged in self.tensors.items()}


def plan_shards(
    adapter: AdapterFiles, base: Path, dtype: str | None, shard_size: int | None = None
) -> tuple[list[Shard], tuple[str, ...]]:
    """(the files to write, the base's tensors that are left out), planned and fully checked from headers alone.

    dtype: safetensors code of the dtype for all weights; None keeps each tensor's dtype.
    shard_size: the largest size of a file in bytes, unless one tensor alone is larger; None keeps the base's files.

    Raises:
        ModelError: the base's tensors do not match the model, or are quantised.
    """
    headers, scales = read_scaled(base, base_headers(base))
    infos = {name: info for header in headers.values() for name, info in header.items()}
    left_out = tuple(summed_up(check_base(adapter, infos), adapter.model_config))
    files = [merged_tensors(adapter, path, header, dtype, scales) for path, header in headers.items()]
    files[-1] |= replaced_tensors(adapter, dtype or main_dtype(infos))
    files = [tensors for tensors in files if tensors] if shard_size is None else divided(files, shard_size)
    shards = [Shard(name, tensors) for name, tensors in zip(shard_names(len(files)), files, strict=True)]
    return shards, left_out


def divided(files: Sequence[Mapping[str, Merged]], shard_size: int) -> list[dict[str, Merged]]:
    """The tensors of all files, in order, in files of up to `shard_size` bytes of tensors, each with at least one."""
    merged = {name: tensor for tensors in files for name, tensor in tensors.items()}
    split = split_by_size({name: tensor.info.nbytes for name, tensor in merged.items()}, shard_size)
    return [{name: merged[name] for name in names} for names in split]


def read_scaled(
    base: Path, headers: Mapping[Path, Mapping[str, TensorInfo]]
) -> tuple[dict[Path, dict[str, TensorInfo]], dict[str, tuple[Path, str]]]:
    """(the headers with fp8 weights as bf16 and without their scales, {weight: file and name of its scales}).

    Raises:
        ModelError: scales have another shape or type than blocks of 128 x 128 have.
    """
    homes = {name: path for path, header in headers.items() for name in header}
    joined = with_scales(str(base), {name: headers[path][name] for name, path in homes.items()})
    scaled = {name: info for name, info in joined.items() if isinstance(info, BlockScaled)}
    infos = joined | {name: TensorInfo("BF16", tuple(info.get_shape())) for name, info in scaled.items()}
    plain = {path: {name: infos[name] for name in header if name in infos} for path, header in headers.items()}
    return plain, {name: (homes[name + SCALES], name + SCALES) for name in scaled}


def merged_tensors(
    adapter: AdapterFiles,
    file: Path,
    header: Mapping[str, TensorInfo],
    dtype: str | None,
    scales: Mapping[str, tuple[Path, str]] = MappingProxyType({}),
) -> dict[str, Merged]:
    """The merged tensors of one file of the base. Fused experts are split, and tensors that the adapter replaces are
    left out."""
    pairs = {pair.parameter: pair for pair in adapter.pairs}
    tensors = {}
    for source, info in header.items():
        fused = source not in adapter.layout
        for name in adapter.fused.get(source, ()) if fused else (source,):
            piece = adapter.layout[name]
            pair = pairs.get(piece.parameter)
            place = piece.place if fused else ...
            merged = merged_info(source, info, piece.shape, dtype)
            tensors[name] = Merged(merged, file, source, place, pair, scales=scales.get(source))
    return {name: merged for name, merged in tensors.items() if name not in adapter.replaced}


def replaced_tensors(adapter: AdapterFiles, dtype: str) -> dict[str, Merged]:
    """The tensors that the adapter replaces, with its factors on top if it has those too."""
    pairs = {pair.parameter: pair for pair in adapter.pairs}
    return {
        name: Merged(
            TensorInfo(dtype_on_disk(name, dtype), adapter.layout[name].shape),
            adapter.directory,
            stored,
            pair=pairs.get(name),
            from_adapter=True,
        )
        for name, stored in adapter.replaced.items()
    }


def check_base(adapter: AdapterFiles, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Raise ModelError unless the base's tensors match the model, with separate or fused experts.

    Returns the tensors that the result leaves out: another head, and buffers that are computed from the config.
    """
    layout = adapter.layout
    tied = {"lm_head.weight"} if adapter.model_config.tie_word_embeddings else set()
    present = infos.keys() | adapter.replaced.keys() | tied
    extra = [name for name in infos if name not in layout and name not in adapter.fused]
    left_out = tuple(
        name
        for name in extra
        if name.startswith(OTHER_HEAD[adapter.head])
        or re.search(COMPUTED, name)
        or is_extra_layer(name, adapter.model_config)
    )
    shapes = {name: piece.shape for name, piece in layout.items() if name not in adapter.replaced}
    shapes |= {name: adapter.parameters[name] for name in adapter.fused}
    faults = {
        "missing": [name for name, piece in layout.items() if name not in present and piece.parameter not in infos],
        "unexpected": [name for name in extra if name not in left_out],
        "misshapen": [
            f"{name} {list(infos[name].shape)}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in infos and infos[name].shape != shape
        ],
    }
    for kind, names in faults.items():
        if names:
            raise ModelError(f"{adapter.base}: {len(names)} tensors are {kind}: {', '.join(sorted(names)[:SHOWN])}")
    return left_out


def merged_info(source: str, info: TensorInfo, shape: tuple[int, ...], dtype: str | None) -> TensorInfo:
    """The dtype and shape of a tensor of the result. Raises ModelError if the source is quantised."""
    if info.dtype not in FLOATS:
        raise ModelError(f"{source} is {info.dtype}: quantised weights cannot be merged; name the original base")
    return TensorInfo(dtype_on_disk(source, dtype or info.dtype), shape)


def main_dtype(infos: Mapping[str, TensorInfo]) -> str:
    """The dtype of most of the numbers."""
    sizes: dict[str, int] = {}
    for info in infos.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + prod(info.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])
