"""A model whose weights are shared among processes: FSDP2 by transformers' DistributedConfig.

Each process builds the model without weights, shards it, and receives its part of the weights that the first process
has read. Weights keep the dtypes of one process (float32 where they are trained), and autocast computes in low
precision as it does there, so that losses and router logits are the same.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .errors import ModelError

FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
# Variables by which `accelerate launch` says that it shards weights, and their values, as accelerate reads them.
LAUNCHERS = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
_TRUE = ("1", "true", "yes", "y", "t", "on")

_BROKEN = ("Connection closed", "Connection reset", "Broken pipe", "Socket Timeout", "remote process exited")
_LATE = ("Timed out", "timed out", "Timeout")


def launched_sharding() -> str | None:
    """What `accelerate launch` was told to shard weights by: FSDP, DeepSpeed, or None."""
    return next((name for name, key in LAUNCHERS.items() if os.environ.get(key, "").lower() in _TRUE), None)


class LostContact(ModelError):
    """Another process has ended, or does not answer. closed: whether it is known to have ended."""

    closed = False


@contextmanager
def at(place: str) -> Iterator[None]:
    """Context for what processes do together: if one of them is gone, the error names the place."""
    try:
        yield
    except LostContact:
        raise
    except RuntimeError as error:  # torch.distributed has no class of its own for what gloo reports
        text = str(error)
        closed = any(sign in text for sign in _BROKEN)
        if not closed and not any(sign in text for sign in _LATE):
            raise
        lost = LostContact(
            f"another process {'has ended' if closed else 'did not answer in time'} while this one was {place}; the "
            "same command resumes from the newest checkpoint"
        )
        lost.closed = closed
        raise lost from error


@dataclass(frozen=True)
class Parallel:
    """fsdp: processes that share the weights; the others hold copies."""

    fsdp: int

    def check(self, processes: int) -> None:
        """Raise ModelError unless this many processes can be divided so."""
        if processes % self.fsdp:
            sizes = [str(size) for size in range(2, processes + 1) if processes % size == 0]
            there = f"there are {processes} processes" if processes > 1 else "there is one process"
            raise ModelError(
                f"parallel.fsdp is {self.fsdp} and {there}, which it must divide: "
                + (f"use {', '.join(sizes)}, or " if sizes else "")
                + f"start {self.fsdp} or a multiple of that: --processes {self.fsdp}"
            )


def base_of(model: Any) -> Any:
    """The model under PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_sharded(model: Any) -> bool:
    """Whether its weights are shared among processes."""
    return bool(getattr(base_of(model), "is_distributed_loading_by_transformers", False))


def shard(load: Callable[[bool], Any], parallel: Parallel) -> Any:
    """A sharded model. load(empty): the whole model, or on the meta device; the first process calls both.

    Raises:
        ModelError: the sizes do not divide the processes, or the model shares weights between modules.
    """
    # Not at the top: transformers 5.17, which models may be used with, has no such mesh.
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh

    parallel.check(dist.get_world_size())
    first = dist.get_rank() == 0
    whole = load(False) if first else None
    model = load(True)
    base = base_of(model)
    if getattr(base.config, "tie_word_embeddings", False):
        raise ModelError("parallel.fsdp: this model's embeddings are its head too (tie_word_embeddings); leave it out")
    if base.can_generate():
        base.generation_config = _from_first(base_of(whole).generation_config if first else None)
    replicas = dist.get_world_size() // parallel.fsdp
    config = DistributedConfig(fsdp_size=parallel.fsdp, dp_replicate_size=replicas)
    device, mesh = initialize_distributed_mesh(config)
    type(base).maybe_distribute_model(base, config, mesh)
    model.to_empty(device=device or torch.device("cpu"))
    set_whole_state(model, whole.state_dict() if whole is not None else {})
    return model.train()


def reshard(model: Any) -> None:
    """Free the weights that a forward pass without a backward pass has left gathered (of the norm and the head): until
    then the model's parameters are not those that an optimizer or a checkpoint must have."""
    for module in base_of(model).modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _from_first(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def set_whole_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give every process its part of the state that the first one holds; called on all of them."""
    set_model_state_dict(model, dict(state), options=FROM_FIRST)


def whole_state(model: nn.Module, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """The whole state on the first process, on the CPU; empty on the others. Called on all of them."""
    reshard(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


@contextmanager
def as_if_whole(model: PreTrainedModel) -> Iterator[None]:
    """Context in which `save_pretrained` with a state dict takes the model for one on a single process."""
    config = model.config.__dict__.pop("distributed_config", None)
    try:
        yield
    finally:
        if config is not None:
            model.config.distributed_config = config


def whole(value: Any) -> Any:
    """A DTensor as a plain tensor, gathered; anything else unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value
