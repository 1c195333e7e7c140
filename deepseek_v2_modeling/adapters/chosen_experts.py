"""LoRA on chosen experts: compact factors in training, PEFT's fused layout in files.

PEFT holds A [E r, in] and B [out, r E] for all E experts. Here the wrapper of the experts' weight holds them for only n
chosen ones, A [n r, in] and B [out, r n], and gradients and optimizer state have the same size. `state_dict` returns
full factors, with zeros for the other experts, and `load_state_dict` accepts them.
"""

import re
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..checkpoints.sources import AdapterSource
from ..errors import ModelError
from ..esft.choice import ExpertChoice
from ..layers.moe import DeepseekV2Experts
from .layouts import stack_down, stack_up

_LAYER = re.compile(r"\.layers\.(\d+)\.mlp\.experts\b")
_DOWN = re.compile(r"\.layers\.(\d+)\.mlp\.experts\.(base_layer\.)?lora_A\.weight$")


class ChosenFactor(nn.Module):
    """A (dim 0) or B (dim 1) of the chosen experts. places: the indices of their rows or columns in the full factor, on
    the CPU (a buffer would be lost where the model is made without weights)."""

    def __init__(self, full: nn.Linear, places: torch.Tensor, dim: int):
        super().__init__()
        self.dim, self.places, self.full_shape = dim, places, tuple(full.weight.shape)
        chosen_part = full.weight.detach().index_select(dim, places.to(full.weight.device))
        self.weight = nn.Parameter(chosen_part, requires_grad=full.weight.requires_grad)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        chosen_part = _whole(weight)
        full = chosen_part.new_zeros(self.full_shape)
        full = full.index_copy(self.dim, self.places.to(full.device), chosen_part)
        destination[f"{prefix}weight"] = _divided_like(weight, full)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        if key in state_dict and tuple(state_dict[key].shape) == self.full_shape:  # the base class reports other shapes
            state_dict[key] = _divided_like(state_dict[key], self.part_of(_whole(state_dict[key]), key))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def part_of(self, full: torch.Tensor, key: str) -> torch.Tensor:
        """The chosen experts' part of a full factor. Raises ModelError if the others' is not zero."""
        places = self.places.to(full.device)
        if full.index_fill(self.dim, places, 0).any():
            raise ModelError(f"{key}: it was trained on experts that are not among the chosen ones")
        return full.index_select(self.dim, places)


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _divided_like(weight: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which each process has, divided among them as `weight` is."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)


class ChosenWrapper(ParamWrapper):
    """PEFT's wrapper of the experts' weight, with all adapters, later ones too, on the `chosen` experts only."""

    chosen: tuple[int, ...]

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        self.keep_chosen(adapter_name)

    def keep_chosen(self, adapter: str) -> None:
        """Replace an adapter's full factors by those of the chosen experts."""
        down: Any = self.lora_A[adapter]
        up: Any = self.lora_B[adapter]
        chosen, ranks = torch.tensor(self.chosen, dtype=torch.long), torch.arange(self.r[adapter])
        rows = (chosen[:, None] * len(ranks) + ranks).flatten()  # of A: the expert is the slowest index
        columns = (ranks[:, None] * self.num_experts + chosen).flatten()  # of B: the fastest
        self.lora_A[adapter] = ChosenFactor(down, rows, dim=0)
        self.lora_B[adapter] = ChosenFactor(up, columns, dim=1)

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        factors: tuple[Any, Any] = self.lora_A[adapter_name], self.lora_B[adapter_name]
        a, b = (factor.state_dict(keep_vars=True)["weight"].to(self.get_param().dtype) for factor in factors)
        return stack_up(b, self.num_experts), stack_down(a, self.num_experts), self.scaling[adapter_name]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        up, down, scaling = self.get_delta_factors(adapter_name)
        return up @ down * scaling


# When a further adapter is added, PEFT finds wrappers by the name of their class.
ChosenWrapper.__name__ = ParamWrapper.__name__


def keep_chosen_parts(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Reduce the full factors of an adapter's state to those that the model has as parameters.

    Raises:
        ModelError: other experts were trained too.
    """
    for name, module in model.named_modules():
        if isinstance(module, ChosenFactor):
            key = f"{name}.weight"
            state[key] = module.part_of(state[key], key)


def train_chosen_adapters(model: PeftModel, choice: ExpertChoice) -> None:
    """Reduce the adapters of the routed experts to the chosen experts.

    Raises:
        ModelError: the choice does not fit the model, or routed experts have no adapter.
    """
    config: Any = model.get_base_model().config  # pyright: ignore[reportCallIssue]
    choice.check(config)
    adapted = False
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and isinstance(module.get_base_layer(), DeepseekV2Experts):
            layer = _LAYER.search(name)
            assert layer is not None
            module.__class__ = ChosenWrapper
            wrapper: Any = module
            wrapper.chosen = tuple(choice.layers[int(layer[1])])
            for adapter in list(wrapper.lora_A):
                wrapper.keep_chosen(adapter)
            adapted = True
    if not adapted:
        raise ModelError(f"{choice.where}: the LoRA targets have no routed experts; add experts to lora.targets")


def chosen_in(source: AdapterSource, experts: int) -> dict[int, tuple[int, ...]]:
    """{layer: experts whose A is not zero} of an adapter in PEFT's layout; {} if routed experts have no adapter.

    B is zero at the start of training, but A is random, so experts with a zero A were not trained.
    """
    chosen: dict[int, set[int]] = {}
    layers = {name: int(match[1]) for name in source.header if (match := _DOWN.search(name))}
    with safe_open(source.weights, "pt") as file:
        for name, layer in layers.items():
            live = file.get_tensor(name).view(experts, -1).any(1).nonzero().flatten()
            chosen.setdefault(layer, set()).update(live.tolist())
    return {layer: tuple(sorted(numbers)) for layer, numbers in chosen.items()}
