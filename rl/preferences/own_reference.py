"""Trainers of TRL whose reference is the model itself before its first update, so that no copy of it is needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.tensor import DTensor


@contextmanager
def own_reference(model: Any) -> Iterator[None]:
    """Context for creating a trainer. TRL would give the model a frozen copy of its adapter, and hashes all weights,
    which it can do of plain tensors only; of weights that are shared, each process hashes its part."""
    parameter = model.get_parameter
    hook = model.register_state_dict_post_hook(_own_parts)
    model.add_adapter = lambda *_: None
    model.get_parameter = lambda name: parameter(name.replace(".ref.", ".default."))  # TRL then copies it to itself
    try:
        yield
    finally:
        hook.remove()
        del model.add_adapter, model.get_parameter


def _own_parts(module: Any, state: dict[str, Any], *_: Any) -> None:
    state.update({name: tensor.to_local() for name, tensor in state.items() if isinstance(tensor, DTensor)})
