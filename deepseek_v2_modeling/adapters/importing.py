"""Imports an adapter of another layout into PEFT's own: per-expert pairs, and what PEFT before 0.19.1 wrote."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
from ..outline import model_shapes
from .files import meta_adapter, read_plain_lora, refuse_variants, with_labels
from .layouts import hub_name, is_per_expert, is_transposed, low_rank_pairs, transpose_pair, untranspose_shapes
from .loading import check_coverage
from .lora import absolute_base
from .per_expert import Read, check_complete, fused_config, plan_groups, read_sources

SAME = "a layout that is PEFT's as well (no experts, shared experts, dense layers or router): copied"


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote. layout: that of the file. zeros: weights of a target that the file has no pair for."""

    layout: str
    tensors: int
    zeros: int
    nbytes: int


@dataclass(frozen=True)
class Conversion:
    """The result: its config, its tensors, and what makes each of them."""

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


def import_adapter(
    adapter_dir: str | Path, out_dir: str | Path, base: str | None = None, progress: Progress | None = None
) -> ImportReport:
    """Writes an adapter with per-expert pairs, or in the layout of PEFT before 0.19.1, in PEFT's layout of today.

    base: the model that it is for; None takes the adapter's own base_model_name_or_path.
    The result gives the logits that the adapter gave where it was trained, and loads here and in stock PEFT.

    Raises:
        ModelError: no adapter or base, an adapter that is in PEFT's layout already, tensors without a place, experts
            that the config names and the file leaves out, numbers that are not finite, or a directory that is not
            empty.
    """
    out_dir = Path(out_dir)
    check_output(out_dir)
    with open_foreign(Path(adapter_dir), base) as foreign:
        source = foreign.source
        fused = source.config.get("target_parameters") and not is_per_expert(source.header, source.config)
        conversion = (convert_transposed if fused else convert_per_expert)(foreign)
        _, wanted = meta_adapter(foreign.model_config, conversion.lora, foreign.head, foreign.source)
        check_coverage(wanted, {n: info.shape for n, info in conversion.infos.items()}, foreign.source.directory)
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
    """Reads the headers of an adapter (or a run's), whatever its layout, and keeps its tensors at hand.

    Raises:
        ModelError: no adapter, or no base.
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
    """The same adapter with its expert tensors as PEFT writes them since 0.19.1.

    Raises:
        ModelError: it is in that layout already.
    """
    peft_model, wanted = meta_adapter(foreign.model_config, foreign.lora, foreign.head, foreign.source)
    pairs = low_rank_pairs(peft_model)
    shapes = foreign.source.shapes
    if not is_transposed(pairs, shapes, wanted, foreign.source.config, foreign.source.directory):
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
    """The per-expert pairs as PEFT's fused ones; without any, pairs that lie the same in both layouts."""
    parameters = model_shapes(foreign.model_config, foreign.head)
    layout = hub_layout(parameters)
    sources, whole = read_sources(foreign.source.header, foreign.source.config, layout, foreign.source.directory)
    if not sources:
        raise ModelError(f"{foreign.source.directory}: there is no pair of LoRA factors in {WEIGHTS}")
    groups = plan_groups(parameters, sources, foreign.read)
    check_complete(groups, foreign.lora, foreign.source.directory)
    targets = {target.parameter: (group, target) for group in groups for target in group.targets}
    if lost := [name for name in sources if layout[name].parameter not in targets]:
        raise ModelError(f"{foreign.source.directory}: {lost[0]} cannot be adapted here")
    lora = fused_config(groups, foreign.source.config, foreign.base)
    peft_model, wanted = meta_adapter(foreign.model_config, lora, foreign.head, foreign.source)
    pairs = low_rank_pairs(peft_model)
    homes = {name: (*targets[pair.parameter], side) for pair in pairs for side, name in enumerate((pair.a, pair.b))}
    others = {name: hub_name(name) for name in wanted if name not in homes}
    if unused := whole.keys() - set(others.values()):
        raise ModelError(f"{foreign.source.directory}: {whole[min(unused)]} has no place in the imported adapter")

    def make(name: str) -> torch.Tensor:
        if name in homes:
            group, target, side = homes[name]
            return group.factors(target, foreign.read)[side]
        home = others[name]  # a head, or the embeddings that PEFT saves beside their adapter
        return foreign.read(whole[home]) if home in whole else read_base_tensor(foreign.base, home)

    infos = {name: TensorInfo("F32", shape) for name, shape in wanted.items()}
    zeros = sum(source is None for _, t in targets.values() for parts in t.experts for _, source in parts)
    from_layout = "one pair for each expert" if is_per_expert(foreign.source.header, foreign.source.config) else SAME
    return Conversion(from_layout, lora, infos, make, zeros)


def read_base_tensor(base: str, name: str) -> torch.Tensor:
    """A tensor of a model's files. Raises ModelError when none has it."""
    for path in base_files(base_directory(base)):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - no mapping
                return check_finite(name, file.get_tensor(name), base)
    raise ModelError(f"{base}: there is no tensor {name}")
