"""What the model's forwards return."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


@dataclass
class DeepseekV2ModelOutput(MoeModelOutputWithPast):
    """Stock's output and `aux_loss`: the sum of the balance losses, coefficients included, or None."""

    aux_loss: torch.Tensor | None = None


@dataclass
class TrainingOutput(MoeCausalLMOutputWithPast):
    """The output of a training forward, whose loss was made without the full logits: `logits` are made when asked
    for, with their gradient. The maker is an entry too, so that a copy of the entries (accelerate's) keeps it."""

    make_logits: Callable[[], torch.Tensor] | None = None

    def _fill(self) -> None:
        make = OrderedDict.get(self, "make_logits")
        if make is not None:
            OrderedDict.__delitem__(self, "make_logits")
            self["logits"] = make()
            order = [field.name for field in fields(self) if OrderedDict.__contains__(self, field.name)]
            for name in order:
                self.move_to_end(name)

    def __getattribute__(self, name: str) -> Any:
        if name == "logits":
            self._fill()
        return super().__getattribute__(name)

    def __getitem__(self, k: Any) -> Any:
        if k == "logits":
            self._fill()
        return super().__getitem__(k)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(key) or (key == "logits" and super().__contains__("make_logits"))

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - it is what `get` does here

    def to_tuple(self) -> tuple:
        self._fill()
        return super().to_tuple()


def causal_lm_output(make_logits: Callable[[], torch.Tensor] | None, **entries: Any) -> MoeCausalLMOutputWithPast:
    """The output with these entries; with `make_logits` one whose logits are made when they are asked for."""
    if make_logits is None:
        return MoeCausalLMOutputWithPast(**entries)
    return TrainingOutput(**entries, make_logits=make_logits)
