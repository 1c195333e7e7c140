"""What the model's forwards return."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


@dataclass
class DeepseekV2ModelOutput(MoeModelOutputWithPast):
    """Stock's output and `aux_loss`: the sum of the balance losses, coefficients included, or None."""

    aux_loss: torch.Tensor | None = None


class TrainingOutput(MoeCausalLMOutputWithPast):
    """The output of a training forward, whose loss was made without the full logits: `logits` are made when asked
    for, with their gradient."""

    make_logits: Callable[[], torch.Tensor] | None = None

    def _fill(self) -> None:
        make, self.make_logits = self.make_logits, None
        if make is not None:
            self["logits"] = make()

    def __getattribute__(self, name: str) -> Any:
        if name == "logits":
            self._fill()
        return super().__getattribute__(name)

    def __getitem__(self, k: Any) -> Any:
        if k == "logits":
            self._fill()
        return super().__getitem__(k)

    def to_tuple(self) -> tuple:
        self._fill()
        return super().to_tuple()


def causal_lm_output(make_logits: Callable[[], torch.Tensor] | None, **fields: Any) -> MoeCausalLMOutputWithPast:
    """The output with these fields; with `make_logits` one whose logits are made when they are asked for."""
    if make_logits is None:
        return MoeCausalLMOutputWithPast(**fields)
    output = TrainingOutput(**fields)
    output.make_logits = make_logits
    return output
