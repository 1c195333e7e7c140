"""How many weights a training run holds, of which dtype, and which of them are trained: from the config alone.

Layers of one kind have the same weights, so that two layers on the meta device stand for all of them: this takes well
under a second for DeepSeek-V2's 236 billion.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..checkpoints.sources import TASKS, Head
from ..configuration import DeepseekV2Config
from ..errors import ModelError
from ..esft.choice import ExpertChoice
from ..layers.quantization import Quantization, storages
from ..loading import LoraSettings, apply_lora, freeze_routers
from ..outline import meta_model

Unit = Literal["root", "dense layer", "MoE layer"]
FLOAT32 = 4  # bytes
_WRAPPERS = ("base_model", "model", "base_layer", "default")  # parts of names that PEFT and our classes add


@dataclass(frozen=True)
class Weight:
    """A parameter of every layer of a kind, or of the root (embeddings, norm, head).

    values: its own number of values; trained of them have gradients. itemsize: bytes of a value, a fraction if it is
    quantised. module: its place within the unit, such as self_attn.o_proj. adapter: whether it is a LoRA factor.
    routed: whether its first dimension is the routed experts. quantized: whether products dequantise it.
    """

    unit: Unit
    module: str
    values: int
    trained: int
    itemsize: float
    adapter: bool
    routed: bool
    quantized: bool = False


@dataclass(frozen=True)
class Sizes:
    """The weights of a model in training. units: how many times each unit is there."""

    weights: tuple[Weight, ...]
    units: dict[Unit, int]

    def total(self, value: Callable[[Weight], float], only: Callable[[Weight], bool] = lambda _: True) -> int:
        """The sum over all weights of the model, or over those that `only` selects."""
        return round(sum(self.units[weight.unit] * value(weight) for weight in self.weights if only(weight)))

    def trains(self, unit: Unit, module: str) -> bool:
        """Whether any weight of the module, adapters included, is trained."""
        return any(w.trained for w in self.weights if w.unit == unit and f"{w.module}.".startswith(f"{module}."))

    def largest_unit(self, value: Callable[[Weight], float]) -> int:
        """The largest sum over the weights of a single unit."""
        kinds = [unit for unit, count in self.units.items() if count]
        return round(max(sum(value(w) for w in self.weights if w.unit == unit) for unit in kinds))


def training_sizes(
    settings: DeepseekV2Config,
    head: Head,
    lora: LoraSettings | None = None,
    *,
    dtype: str = "float32",
    experts: ExpertChoice | None = None,
    router: bool = True,
    quantization: Quantization | None = None,
) -> Sizes:
    """The sizes of the model that `loading.prepare_trainable` would load with the same arguments.

    Raises:
        ModelError: the settings cannot be built into a model, or a LoRA target matches nothing.
    """
    moe = [i for i in range(settings.num_hidden_layers) if settings.is_moe_layer(i)]
    units: dict[Unit, int] = {"root": 1, "dense layer": settings.num_hidden_layers - len(moe), "MoE layer": len(moe)}
    model = meta_model(_two_layers(settings, units), head, quantization)
    names: list[Unit] = [unit for unit in ("dense layer", "MoE layer") if units[unit]]
    if lora is not None or experts is not None:
        model.requires_grad_(False)
        model.to(getattr(torch, dtype))
    elif not router:
        freeze_routers(model)
    adapted: Any = apply_lora(model, lora.config(TASKS[head])) if lora is not None else model
    if experts is not None and head == "score":
        model.score.requires_grad_(True)
    share = None if experts is None else _chosen_share(settings, experts, len(moe))
    return Sizes(tuple(_weights(adapted, names, share)), units)


def _two_layers(settings: DeepseekV2Config, units: dict[Unit, int]) -> DeepseekV2Config:
    """The settings of a model with one layer of each kind that there is."""
    small = copy.deepcopy(settings)
    kinds = [bool(units["dense layer"]), bool(units["MoE layer"])]
    small.num_hidden_layers = sum(kinds)
    small.first_k_dense_replace = int(kinds[0])
    small.moe_layer_freq = 1
    if hasattr(small, "mlp_layer_types"):
        small.mlp_layer_types = ["dense"] * kinds[0] + ["sparse"] * kinds[1]
    return small


def _chosen_share(settings: DeepseekV2Config, experts: ExpertChoice, layers: int) -> float:
    """The share of the routed experts that an experts file selects."""
    if not layers or not settings.n_routed_experts:
        raise ModelError("the experts file chooses experts of a model that has none")
    return sum(map(len, experts.layers.values())) / (layers * settings.n_routed_experts)


def _weights(model: nn.Module, units: list[Unit], share: float | None) -> Iterator[Weight]:
    """The parameters of a model with one layer of each unit. share: of the routed experts, if only some of them are
    trained: those have adapters, or float32 copies beside the frozen weights."""
    adapted, stored = hasattr(model, "peft_config"), storages(model)
    for name, parameter in model.named_parameters():
        path = [part for part in name.split(".") if part not in _WRAPPERS]
        unit: Unit = "root"
        if path[0] == "layers":
            unit, path = units[int(path[1])], path[2:]
        factor, routed = any(part.startswith("lora_") for part in path), "experts" in path
        module = ".".join(path[:-1] if path[-1] == "weight" else path)
        own = math.prod(stored[name].shape) if name in stored else parameter.numel()
        values = round(own * (share if factor and routed and share is not None else 1))
        trained, itemsize = (values, FLOAT32) if parameter.requires_grad else (0, parameter.nbytes / parameter.numel())
        if name in stored:
            itemsize = parameter.nbytes / own
        yield Weight(unit, module, values, trained, itemsize, factor, routed, name in stored)
        if routed and share is not None and not adapted:
            copied = round(values * share)
            yield Weight(unit, f"{module}.chosen", copied, copied, FLOAT32, False, True)
