"""The layouts of adapters in files: PEFT's fused layout, its transposed older version, and one pair per expert.

PEFT since 0.19.1: a 3-D weight [E, out, in] has A [E r, in], viewed as (E, r, in), and B [out, r E], viewed as
(out, r, E), where the expert is the fastest index. Earlier versions took dim 1 of the weight for its input: there A is
[E r, out] and B is [in, r E], so A and B have swapped roles.

Per expert: plain 2-D pairs such as `mlp.experts.7.gate_proj.lora_A.weight`. Older PEFT wrote them for the official
remote code and for transformers before 5; vLLM and SGLang read them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from torch import nn

from ..configuration import CORRECTION_BIAS
from ..errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]
PREFIX = "base_model.model."
UNTRANSPOSED_SINCE = (0, 19, 1)
PER_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class FactorPair:
    """A pair of factors: `parameter` += scaling * up @ down.

    a, b: the factors' names in the adapter's file. experts: E of a 3-D parameter, 0 for a 2-D one.
    """

    parameter: str
    a: str
    b: str
    rank: int
    scaling: float
    experts: int = 0
    embedding: bool = False

    def factors(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(down [r, in], up [out, r]), or (down [E, r, in], up [E, out, r]), as views of the file's tensors."""
        if self.embedding:
            return b.T, a.T
        if self.experts:
            return stack_down(a, self.experts), stack_up(b, self.experts)
        return a, b


def stack_down(a: torch.Tensor, experts: int) -> torch.Tensor:
    """PEFT's A [E r, in] as [E, r, in]."""
    return a.reshape(experts, -1, a.shape[-1])


def stack_up(b: torch.Tensor, experts: int) -> torch.Tensor:
    """PEFT's B [out, r E] as [E, out, r]."""
    return b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


def flatten_down(down: torch.Tensor) -> torch.Tensor:
    """[E, r, in] as PEFT's A."""
    return down.reshape(-1, down.shape[-1])


def flatten_up(up: torch.Tensor) -> torch.Tensor:
    """[E, out, r] as PEFT's B."""
    return up.permute(1, 2, 0).reshape(up.shape[1], -1)


def transpose_pair(a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert from the layout of PEFT before 0.19.1 to the current one, or back: the function is its own inverse."""
    return flatten_down(stack_up(b, experts).transpose(1, 2)), flatten_up(stack_down(a, experts).transpose(1, 2))


def low_rank_pairs(peft_model: PeftModel, adapter: str = "default") -> list[FactorPair]:
    """The factor pairs of a wrapped model, under the names with which PEFT saves them."""
    pairs = []
    for name, module in peft_model.named_modules():
        if not (isinstance(module, LoraLayer) and isinstance(module, nn.Module) and adapter in module.r):
            continue
        wrapped = isinstance(module, ParamWrapper)
        embedding = isinstance(module, Embedding)
        infix, ending = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        pairs.append(
            FactorPair(
                parameter=f"{hub_name(name)}.{module.parameter_name if wrapped else 'weight'}",
                a=f"{name}.{infix}A{ending}",
                b=f"{name}.{infix}B{ending}",
                rank=module.r[adapter],
                scaling=module.scaling[adapter],
                experts=module.num_experts if wrapped and module.get_param().ndim == 3 else 0,
                embedding=embedding,
            )
        )
    return pairs


def hub_name(name: str) -> str:
    """The name of a wrapped module or saved tensor in the model without adapters."""
    return name.removeprefix(PREFIX).replace(".base_layer", "")


def common_scaling(kinds: Iterable[tuple[int, float]]) -> tuple[int, int]:
    """A common (rank, alpha) for pairs with these (rank, scaling): the largest rank, and the scaling times that rank.

    If the scalings differ, or the product is not an integer (vLLM needs an integer alpha), alpha is the rank, and each
    pair's scaling has to be multiplied into its B.
    """
    kinds = list(kinds)
    rank = max(rank for rank, _ in kinds)
    scalings = {scaling for _, scaling in kinds}
    alpha = scalings.pop() * rank
    is_integer = not scalings and alpha >= 1 and float(alpha).is_integer()
    return rank, int(alpha) if is_integer else rank


def pad(factor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    """Pad a factor with zeros along `dim` to `rank`."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


# --- Detecting the layout of a file ------------------------------------------------------------------------------


def is_per_expert(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether an adapter is in the per-expert layout: routed experts have separate pairs, or shared experts and dense
    layers are `target_modules`."""
    old_target = (".gate_proj.", ".up_proj.", ".down_proj.", ".mlp.gate.")
    return any(
        PER_EXPERT.search(name) or (not config.get("target_parameters") and any(part in name for part in old_target))
        for name in names
        if not name.endswith(CORRECTION_BIAS)  # whole tensors of the routers, in any layout
    )


def refuse_per_expert(names: Iterable[str], config: Mapping[str, Any], where: str | Path) -> None:
    """Raise ModelError, with the remedy, for an adapter in the per-expert layout."""
    if is_per_expert(names, config):
        raise ModelError(
            f"{where}: this adapter has one pair for each expert (as servers and PEFT before transformers 5 have it); "
            f"convert it first: dsv2 import {where} OUT_DIR"
        )


def is_transposed(
    pairs: Iterable[FactorPair], saved: Shapes, expected: Shapes, config: Mapping[str, Any], where: str | Path
) -> bool:
    """Whether a file's expert pairs are in the transposed layout of PEFT before 0.19.1.

    This is visible from shapes, unless every adapted expert weight is square; then `peft_version` in
    adapter_config.json decides.

    Raises:
        ModelError: the file mixes both layouts, or the layout cannot be determined.
    """
    verdicts = {
        _is_transposed(pair, saved, expected)
        for pair in pairs
        if pair.experts and pair.a in saved and pair.b in saved and pair.a in expected
    }
    if verdicts >= {True, False}:
        raise ModelError(f"{where}: some expert tensors are transposed (PEFT before 0.19.1), others are not")
    if verdicts <= {False, True}:
        return True in verdicts
    if len(verdicts) > 1:  # the weights that are not square decide
        return True in verdicts
    version = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(config.get("peft_version")))
    if version is None:
        raise ModelError(
            f"{where}: the adapted expert weights are square, so that their shapes do not show whether PEFT before or "
            'since 0.19.1 wrote them; add "peft_version" to adapter_config.json'
        )
    return tuple(int(number or 0) for number in version.groups()) < UNTRANSPOSED_SINCE


def _is_transposed(pair: FactorPair, saved: Shapes, expected: Shapes) -> bool | None:
    """Whether a pair is transposed; None for a square weight. Pairs of other shapes count as not transposed, and the
    coverage check reports them."""
    (rows, inner), (outer, columns) = expected[pair.a], expected[pair.b]
    if inner == outer:
        return None
    return (saved[pair.a], saved[pair.b]) == ((rows, outer), (inner, columns))


def untranspose_shapes(pairs: Iterable[FactorPair], saved: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of a transposed file's tensors after `untranspose`."""
    shapes = dict(saved)
    for pair in pairs:
        if pair.experts and pair.a in saved and pair.b in saved:
            (rows, outer), (inner, columns) = saved[pair.a], saved[pair.b]
            shapes |= {pair.a: (rows, inner), pair.b: (outer, columns)}
    return shapes


def untranspose(pairs: Iterable[FactorPair], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a transposed file, converted to the current layout."""
    converted = dict(tensors)
    for pair in pairs:
        if pair.experts and pair.a in tensors and pair.b in tensors:
            a, b = transpose_pair(tensors[pair.a], tensors[pair.b], pair.experts)
            converted |= {pair.a: a.contiguous(), pair.b: b.contiguous()}
    return converted
