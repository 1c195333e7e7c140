"""Finds the source of a non-finite number: runs the forward again and checks every module's output."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


def first_bad_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Run `forward` without gradients and describe the first module whose output has a NaN or an infinity.

    Outputs are checked as modules finish, so submodules come before their parents. None if all outputs are finite.
    """
    faults: list[str] = []
    names = {module: name or "the model" for name, module in model.named_modules()}

    def check(module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        if not faults and (bad := count_bad(output)):
            faults.append(_describe(module, names[module], bad, count_bad((inputs, kwargs))))

    handles = [module.register_forward_hook(check, with_kwargs=True) for module in names]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return faults[0] if faults else None


def first_bad_gradient(model: nn.Module, backward: Callable[[], Any]) -> str | None:
    """Run `backward`, which recomputes the gradients, and name the weight with a non-finite gradient that is closest to
    the loss; None if all are finite."""
    model.zero_grad(set_to_none=True)
    backward()
    bad = [name for name, p in model.named_parameters() if p.grad is not None and count_bad(p.grad)]
    return f"the gradient of {bad[-1]} ({len(bad)} weights have a bad one)" if bad else None


def count_bad(value: Any) -> int:
    """The number of non-finite values in the tensors of a nested value."""
    return sum(int((~torch.isfinite(tensor)).sum()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _describe(module: nn.Module, name: str, bad: int, bad_inputs: int) -> str:
    weights = [key for key, p in module.named_parameters() if count_bad(p)]
    if weights:
        why = f"its weight {weights[0]} holds them already"
    elif bad_inputs:
        why = "they were in its input already"
    else:
        why = "its input and its weights are finite"
    return f"{name} ({type(module).__name__}): {bad:,} of its outputs are not finite, {why}"
