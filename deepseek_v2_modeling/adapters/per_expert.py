"""Converts per-expert pairs of factors to PEFT's fused ones.

gate_proj and up_proj are one fused parameter: their pairs are joined (A stacked, B block-diagonal, ranks added), or
keep their rank if both have the same A, as exported adapters do. Weights without a pair get zeros, since a PEFT target
covers all weights of a name.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from ..checkpoints.hub_layout import Piece, hub_layout
from ..checkpoints.strict import name_some
from ..checkpoints.tensor_files import TensorInfo
from ..errors import ModelError
from .layouts import common_scaling, flatten_down, flatten_up, hub_name, pad
from .lora import PROJECTIONS

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")
Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Source:
    """A pair in the file: the names of its factors, its rank and its scaling."""

    a: str
    b: str
    rank: int
    scaling: float
    embedding: bool = False

    def factors(self, read: Read, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(down [r, in], up [out, r]) in float32, rescaled for this scaling."""
        a, b = read(self.a).float(), read(self.b).float()
        down, up = (b.T, a.T) if self.embedding else (a, b)
        return down, up if self.scaling == scaling else up * (self.scaling / scaling)


@dataclass(frozen=True)
class Target:
    """A parameter of the model. experts: for each expert (or once), the parameter's pieces and the file's pair for
    each, if any."""

    parameter: str
    shape: tuple[int, ...]
    experts: tuple[tuple[tuple[Piece, Source | None], ...], ...]

    @property
    def sources(self) -> list[Source]:
        return [source for parts in self.experts for _, source in parts if source]


@dataclass(frozen=True)
class Group:
    """All parameters of one PEFT target. same_a: whether the pieces of each expert share the same A."""

    suffix: str
    is_module: bool
    targets: tuple[Target, ...]
    same_a: bool
    rank: int
    alpha: int

    def factors(self, target: Target, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) of a parameter in PEFT's layout."""
        scaling = self.alpha / self.rank
        pairs = [combine(parts, read, scaling, self.same_a) for parts in target.experts]
        downs = [pad(down, self.rank, 0) for down, _ in pairs]
        ups = [pad(up, self.rank, 1) for _, up in pairs]
        if len(target.shape) == 3:
            return flatten_down(torch.stack(downs)), flatten_up(torch.stack(ups))
        if any(source.embedding for source in target.sources):
            return ups[0].T, downs[0].T
        return downs[0], ups[0]


def combine(
    parts: Sequence[tuple[Piece, Source | None]], read: Read, scaling: float, same_a: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine the pairs of vertically stacked parts into one: (down [r, in], up [sum of out, r])."""
    columns = parts[0][0].shape[1]
    pairs = [
        source.factors(read, scaling) if source else (torch.zeros(0, columns), torch.zeros(piece.shape[0], 0))
        for piece, source in parts
    ]
    if same_a:
        down = max((down for down, _ in pairs), key=len)
        return down, torch.cat([pad(up, len(down), 1) for _, up in pairs])
    return torch.cat([down for down, _ in pairs]), torch.block_diag(*(up for _, up in pairs))


# --- Reading the file's names ------------------------------------------------------------------------------------


def read_sources(
    infos: Mapping[str, TensorInfo], config: Mapping[str, Any], layout: Mapping[str, Piece], where: str | Path
) -> tuple[dict[str, Source], dict[str, str]]:
    """({hub tensor: its pair}, {hub tensor: name of a whole tensor in the file}).

    Raises:
        ModelError: a tensor does not belong to the model, a factor lacks its counterpart, or a rank differs from the
            config.
    """
    halves: dict[str, dict[str, str]] = {}
    whole_tensors: dict[str, str] = {}
    for name in infos:
        match = FACTOR.fullmatch(name)
        home = f"{hub_name(match['module'])}.weight" if match else hub_name(name)
        if home not in layout:
            raise ModelError(f"{where}: the base has no place for {name}")
        if match:
            halves.setdefault(home, {})[match["side"]] = name
        else:
            whole_tensors[home] = name
    return {home: _source(home, names, infos, config, layout, where) for home, names in halves.items()}, whole_tensors


def _source(
    home: str,
    names: Mapping[str, str],
    infos: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    layout: Mapping[str, Piece],
    where: str | Path,
) -> Source:
    if set(names) != {"A", "B"}:
        raise ModelError(f"{where}: {next(iter(names.values()))} lacks its other factor")
    module = home.removesuffix(".weight")
    embedding = "lora_embedding_" in names["A"]
    a, b = infos[names["A"]].shape, infos[names["B"]].shape
    rank = _pattern_value(config, "rank_pattern", module, config["r"])
    rows, columns = layout[home].shape
    if (a, b) != (((rank, rows), (columns, rank)) if embedding else ((rank, columns), (rows, rank))):
        raise ModelError(
            f"{where}: {names['A']} {list(a)} and {names['B']} {list(b)} do not fit rank {rank} and the base's "
            f"{list(layout[home].shape)}"
        )
    alpha = _pattern_value(config, "alpha_pattern", module, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Source(names["A"], names["B"], rank, scaling, embedding)


def _pattern_value(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """A module's value in rank_pattern or alpha_pattern, by PEFT's own rule."""
    pattern = config.get(field) or {}
    return pattern.get(get_pattern_key(list(pattern), module), default)


# --- Planning ----------------------------------------------------------------------------------------------------


def plan_groups(parameters: Mapping[str, tuple[int, ...]], sources: Mapping[str, Source], read: Read) -> list[Group]:
    """The PEFT targets needed for the pairs of a file, with all weights of the model that each target covers."""
    targets: dict[tuple[bool, str], list[Target]] = {}
    for parameter, shape in parameters.items():
        if kind := target_of(parameter):
            targets.setdefault(kind, []).append(_target(parameter, shape, sources))
    groups = []
    for (is_module, suffix), members in targets.items():
        if adapted := [parts for target in members for parts in target.experts if any(source for _, source in parts)]:
            same_a = all(have_same_a([source for _, source in parts if source], read) for parts in adapted)
            kinds = [
                ((max if same_a else sum)(source.rank for _, source in parts if source), source.scaling)
                for parts in adapted
                for _, source in parts
                if source
            ]
            groups.append(Group(suffix, is_module, tuple(members), same_a, *common_scaling(kinds)))
    return groups


def check_complete(groups: Iterable[Group], lora: LoraConfig, where: str | Path) -> None:
    """Raise ModelError if the file has pairs for only some experts of a layer although its config targets the others.

    A config that names its experts (as an adapter on chosen experts may) leaves the others out on purpose.
    """
    missing = []
    for target in (target for group in groups for target in group.targets if len(target.shape) == 3):
        sources = [source for parts in target.experts for _, source in parts]
        by_name = dict(zip(hub_layout({target.parameter: target.shape}), sources, strict=True))
        kinds = {_projection(name) for name, source in by_name.items() if source}
        missing += [name for name, source in by_name.items() if source is None and _projection(name) in kinds]
    missing = [name for name in missing if check_target_module_exists(lora, name.removesuffix(".weight"))]
    if missing:
        raise ModelError(
            f"{where}: no pair for {len(missing)} of the experts' weights, though others of their layers have one: "
            f"{name_some(missing)}; the file is incomplete. If these were left out on purpose, let target_modules in "
            "adapter_config.json name the trained experts only"
        )


def _projection(name: str) -> str:
    """The projection's name: gate_proj for "...experts.7.gate_proj.weight"."""
    return name.split(".")[-2]


def target_of(parameter: str) -> tuple[bool, str] | None:
    """The PEFT target of a parameter, as (whether it belongs in target_modules, suffix); None for norms."""
    module = parameter.removesuffix(".weight")
    for projection in PROJECTIONS.values():
        for suffix in projection.modules:
            if f".{module}".endswith(f".{suffix}"):
                return True, suffix
        for suffix in projection.parameters:
            if parameter.endswith(f".{suffix}"):
                return False, suffix
    return None


def _target(parameter: str, shape: tuple[int, ...], sources: Mapping[str, Source]) -> Target:
    experts: dict[int, list[tuple[Piece, Source | None]]] = {}
    for name, piece in hub_layout({parameter: shape}).items():
        experts.setdefault(piece.place[0] if piece.place else 0, []).append((piece, sources.get(name)))
    return Target(parameter, shape, tuple(map(tuple, experts.values())))


def have_same_a(sources: Sequence[Source], read: Read) -> bool:
    """Whether all of these pairs have the same A."""
    first = sources[0]
    return all(source.rank == first.rank and torch.equal(read(source.a), read(first.a)) for source in sources[1:])


def fused_config(groups: Iterable[Group], raw: Mapping[str, Any], base: str) -> LoraConfig:
    """The config of the imported adapter."""
    groups = list(groups)
    first = groups[0]
    return LoraConfig(
        base_model_name_or_path=base,
        task_type=raw.get("task_type"),
        inference_mode=True,
        r=first.rank,
        lora_alpha=first.alpha,
        rank_pattern={group.suffix: group.rank for group in groups if group.rank != first.rank},
        alpha_pattern={group.suffix: group.alpha for group in groups if group.alpha != first.alpha},
        target_modules=[group.suffix for group in groups if group.is_module],
        target_parameters=[group.suffix for group in groups if not group.is_module] or None,
        modules_to_save=raw.get("modules_to_save"),
    )
