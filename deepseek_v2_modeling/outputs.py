"""The outputs of the model's forward passes."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


@dataclass
class DeepseekV2ModelOutput(MoeModelOutputWithPast):
    """The stock output plus `aux_loss`: the sum of the balance losses, weighted by their coefficients, or None."""

    aux_loss: torch.Tensor | None = None


@dataclass
class CausalLMOutput(MoeCausalLMOutputWithPast):
    """The stock output with `aux_loss` moved to the end, so that the first entry is the loss or the logits, as in other
    models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if OrderedDict.__contains__(self, "aux_loss"):
            self.move_to_end("aux_loss")


@dataclass
class TrainingOutput(CausalLMOutput):
    """The output of a training forward whose loss was computed without the full logits.

    `logits` are computed, with their gradient, when they or all entries are accessed. Under mixed precision accelerate
    copies the entries of each output; `make_logits` is one of them, visible only to that copy, so the copy stays lazy.
    """

    make_logits: Callable[[], torch.Tensor] | None = None

    def _fill(self) -> None:
        make = OrderedDict.get(self, "make_logits")
        if make is not None:
            OrderedDict.__delitem__(self, "make_logits")
            self["logits"] = make()
            for name in [f.name for f in fields(self) if f.name != "aux_loss"] + ["aux_loss"]:
                if OrderedDict.__contains__(self, name):
                    self.move_to_end(name)

    def __getattribute__(self, name: str) -> Any:
        if name == "logits":
            self._fill()
        return super().__getattribute__(name)

    def __getitem__(self, k: Any) -> Any:
        if k == "logits":
            self._fill()
        return OrderedDict.__getitem__(self, k) if isinstance(k, str) else self.to_tuple()[k]

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return super().__iter__()

    def keys(self) -> Any:
        self._fill()
        return super().keys()

    def values(self) -> Any:
        self._fill()
        return super().values()

    def items(self) -> Any:
        if sys._getframe(1).f_globals.get("__name__") != "accelerate.utils.operations":
            self._fill()
        return super().items()

    def __contains__(self, key: Any) -> bool:
        pending = super().__contains__("make_logits")
        return pending if key == "logits" and pending else key != "make_logits" and super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - it is what `get` does here

    def to_tuple(self) -> tuple:
        self._fill()
        return super().to_tuple()


def causal_lm_output(make_logits: Callable[[], torch.Tensor] | None, **entries: Any) -> MoeCausalLMOutputWithPast:
    """The output with these entries; given `make_logits`, its logits are computed lazily."""
    if make_logits is None:
        return CausalLMOutput(**entries)
    return TrainingOutput(**entries, make_logits=make_logits)
