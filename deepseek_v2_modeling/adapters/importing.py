"""Converts adapters to PEFT's current layout, from per-expert pairs or the layout of PEFT before 0.19.1."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open

from ..checkpoints.adapter_config import WEIGHTS, is_adapter
from ..checkpoints.finite import check_finite
from ..checkpoints.hub_layout import hub_layout
from ..checkpoints.sources import (
    FINAL,
    AdapterSource,
    Head,
    base_directory,
    copy_side_files,
    read_adapter,
    read_model_config,
)
from ..checkpoints.tensor_files import (
    DTYPES,
    Progress,
    TensorInfo,
    base_files,
    check_output,
    check_space,
    counter,
    file_size,
    whole_directory,
    write_tensors,
)
from ..configuration import DeepseekV2Config
from ..errors import ModelError
from ..outline import meta_model
from .files import meta_adapter, read_plain_lora, refuse_variants, with_labels
from .layouts import hub_name, is_per_expert, is_transposed, low_rank_pairs, transpose_pair, untranspose_shapes
from .loading import check_coverage, shapes_of
from .lora import absolute_base
from .per_expert import Read, check_complete, fused_config, plan_groups, read_sources

SAME = "a layout that is PEFT's as well (no experts, shared experts, dense layers or router): copied"


@dataclass(frozen=True)
class ImportReport:
    """The result of an import. layout: the layout of the source. zeros: number of weights without a pair in the source,
    which get zeros. nbytes: size of the written file."""

    layout: str
    tensors: int
    zeros: int
    nbytes: int


@dataclass(frozen=True)
class Conversion:
    """A planned conversion: the new config, the new tensors, and a function that computes each of them."""

    layout: str
    lora: LoraConfig
    infos: Mapping[str, TensorInfo]
    make: Callable[[str], torch.Tensor]
    zeros: int = 0


@dataclass(frozen=True)
class Foreign:
    """An adapter to import, and the structure of its base."""

    source: AdapterSource
    lora: LoraConfig
    base: str
    model_config: DeepseekV2Config
    head: Head
    read: Read

    def outline(self) -> Any:
        """The base without weights."""
        return meta_model(self.model_config, self.head)


def import_adapter(
    adapter_dir: str | Path, out_dir: str | Path, base: str | None = None, progress: Progress | None = None
) -> ImportReport:
    """Write an adapter with per-expert pairs, or in the layout of PEFT before 0.19.1, in PEFT's current layout.

    The result computes the same logits as the adapter did where it was trained, and loads here and in stock PEFT.

    base: the base model; None uses the adapter's own base_model_name_or_path.

    Raises:
        ModelError: there is no adapter or base, the adapter is already in PEFT's layout, tensors do not belong to the
            model, experts named in the config are missing from the file, numbers are not finite, or out_dir is not
            empty.
    """
    out_dir = Path(out_dir)
    check_output(out_dir)
    with open_foreign(Path(adapter_dir), base) as foreign:
        source = foreign.source
        fused = source.config.get("target_parameters") and not is_per_expert(source.header, source.config)
        conversion = (convert_transposed if fused else convert_per_expert)(foreign)
        _, expected = meta_adapter(foreign.outline(), conversion.lora, foreign.source)
        check_coverage(expected, shapes_of(conversion.infos), foreign.source.directory)
        total = file_size(conversion.infos)
        check_space(out_dir, total)
        with whole_directory(out_dir) as directory:
            write_tensors(
                directory / WEIGHTS,
                conversion.infos,
                lambda name: [conversion.make(name).to(DTYPES[conversion.infos[name].dtype])],
                counter(progress, total),
            )
            conversion.lora.save_pretrained(str(directory))
            copy_side_files(foreign.source.directory, None, directory)
    return ImportReport(conversion.layout, len(conversion.infos), conversion.zeros, total)


@contextmanager
def open_foreign(path: Path, base: str | None) -> Iterator[Foreign]:
    """Context manager that reads the headers of an adapter (or a run's) in any layout, and keeps its file open.

    Raises:
        ModelError: there is no adapter, or no base.
    """
    directory = path / FINAL if (path / FINAL).is_dir() else path
    if not is_adapter(directory):
        raise ModelError(f"{directory}: not an adapter (there is no adapter_config.json)")
    source = read_adapter(directory)
    lora = read_plain_lora(source)
    refuse_variants(source)
    base = base or source.base
    if not base:
        raise ModelError(f"{directory}/adapter_config.json names no base model; name it with --base MODEL")
    settings = with_labels(read_model_config(base), source.header)
    with safe_open(source.weights, "pt") as file:

        def read(name: str) -> torch.Tensor:
            return check_finite(name, file.get_tensor(name), directory)

        yield Foreign(source, lora, absolute_base(base) or base, settings, source.head, read)


def convert_transposed(foreign: Foreign) -> Conversion:
    """Convert the expert tensors to the layout of PEFT since 0.19.1.

    Raises:
        ModelError: the adapter is already in that layout.
    """
    peft_model, expected = meta_adapter(foreign.outline(), foreign.lora, foreign.source)
    pairs = low_rank_pairs(peft_model)
    shapes = shapes_of(foreign.source.header)
    if not is_transposed(pairs, shapes, expected, foreign.source.config, foreign.source.directory):
        raise ModelError(f"{foreign.source.directory} is in PEFT's layout already; nothing to import")
    homes = {name: pair for pair in pairs if pair.experts for name in (pair.a, pair.b)}

    def make(name: str) -> torch.Tensor:
        if name not in homes:
            return foreign.read(name)
        pair = homes[name]
        return transpose_pair(foreign.read(pair.a), foreign.read(pair.b), pair.experts)[name == pair.b]

    new = untranspose_shapes(pairs, shapes)
    infos = {name: TensorInfo(info.dtype, new[name]) for name, info in foreign.source.header.items()}
    lora = foreign.lora
    lora.base_model_name_or_path = foreign.base
    lora.peft_version = LoraConfig().peft_version
    return Conversion("PEFT before 0.19.1", lora, infos, make)


def convert_per_expert(foreign: Foreign) -> Conversion:
    """Convert per-expert pairs to PEFT's fused ones; other pairs are the same in both layouts.

    Raises:
        ModelError: there are no pairs, or tensors that do not belong to the model.
    """
    outline = foreign.outline()
    parameters = shapes_of(outline.state_dict())
    layout = hub_layout(parameters)
    sources, whole_tensors = read_sources(
        foreign.source.header, foreign.source.config, layout, foreign.source.directory
    )
    if not sources:
        raise ModelError(f"{foreign.source.directory}: there is no pair of LoRA factors in {WEIGHTS}")
    groups = plan_groups(parameters, sources, foreign.read)
    check_complete(groups, foreign.lora, foreign.source.directory)
    targets = {target.parameter: (group, target) for group in groups for target in group.targets}
    if lost := [name for name in sources if layout[name].parameter not in targets]:
        raise ModelError(f"{foreign.source.directory}: {lost[0]} cannot be adapted here")
    lora = fused_config(groups, foreign.source.config, foreign.base)
    peft_model, expected = meta_adapter(outline, lora, foreign.source)
    pairs = low_rank_pairs(peft_model)
    homes = {name: (*targets[pair.parameter], side) for pair in pairs for side, name in enumerate((pair.a, pair.b))}
    other_tensors = {name: hub_name(name) for name in expected if name not in homes}
    if unused := whole_tensors.keys() - set(other_tensors.values()):
        raise ModelError(
            f"{foreign.source.directory}: {whole_tensors[min(unused)]} has no place in the imported adapter"
        )

    def make(name: str) -> torch.Tensor:
        if name in homes:
            group, target, side = homes[name]
            return group.factors(target, foreign.read)[side]
        home = other_tensors[name]  # a head, or embeddings that PEFT saves with their adapter
        return foreign.read(whole_tensors[home]) if home in whole_tensors else read_base_tensor(foreign.base, home)

    infos = {name: TensorInfo("F32", shape) for name, shape in expected.items()}
    zeros = sum(source is None for _, t in targets.values() for parts in t.experts for _, source in parts)
    from_layout = "one pair for each expert" if is_per_expert(foreign.source.header, foreign.source.config) else SAME
    return Conversion(from_layout, lora, infos, make, zeros)


def read_base_tensor(base: str, name: str) -> torch.Tensor:
    """A tensor of a model's files. Raises ModelError if there is no such tensor."""
    for path in base_files(base_directory(base)):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - no mapping
                return check_finite(name, file.get_tensor(name), base)
    raise ModelError(f"{base}: there is no tensor {name}")
