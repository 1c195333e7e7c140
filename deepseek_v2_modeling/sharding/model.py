"""A model whose weights are shared among processes: FSDP2 by transformers' DistributedConfig.

Each process builds the model without weights, shards it, and reads its part of the weights; new adapters and heads
come from the first process. Weights keep the dtypes of one process (float32 where they are trained), and autocast
computes in low precision as it does there, so that losses and router logits are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..adapters.loading import is_placeholder
from ..adapters.router_biases import own_biases
from ..errors import ModelError
from ..layers.quantization import quantization_of
from ..loading import Weights, meta_model, model_class
from .layout import Parallel
from .reading import read_base

FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
PARTLY = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


def base_of(model: Any) -> Any:
    """The model under PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_sharded(model: Any) -> bool:
    """Whether its weights are shared among processes."""
    return bool(getattr(base_of(model), "is_distributed_loading_by_transformers", False))


def shard(load: Callable[[Weights], Any], parallel: Parallel) -> Any:
    """A sharded model, with weights from the files of its base. load: the model, as `loading.prepare_trainable` gives
    it; on the first process it is called first, since it may have to write the base.

    Raises:
        ModelError: the sizes do not divide the processes or experts, or the model shares weights between modules; or as
            `read_base`.
    """
    parallel.check(dist.get_world_size())
    own = load("placeholders") if dist.get_rank() == 0 else None
    dist.barrier()
    model = load("meta")
    base = base_of(model)
    parallel.check_experts(base.config.n_routed_experts)
    if getattr(base.config, "tie_word_embeddings", False):
        raise ModelError("parallel.fsdp: this model's embeddings are its head too (tie_word_embeddings); leave it out")
    model.to_empty(device=_divide(base, parallel))
    absent = {*read_weights(model, base.config.name_or_path), *own_biases(model)}
    if own is not None:  # an adapter may bring weights of the base, such as embeddings
        absent |= {name for name, parameter in own.named_parameters() if not is_placeholder(parameter)}
    # Parameters, since the state has the factors of all experts where only chosen ones have them.
    held = {} if own is None else {**own.state_dict(), **dict(own.named_parameters())}
    state = {name: tensor.detach() for name, tensor in held.items() if name in absent}
    set_model_state_dict(model, state, options=PARTLY)
    return model.train()


def _divide(base: Any, parallel: Parallel) -> torch.device:
    """Divide the weights of a model on the meta device; returns the device that this process's part belongs on."""
    # Not at the top: transformers 5.17, which models may be used with, has no such mesh.
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh

    from . import experts

    spread: dict[str, Any] = {}
    if parallel.ep > 1:
        base.ep_plan = experts.plan(base)
        spread = {"ep_size": parallel.ep, "ep_implementation": experts.EXCHANGE}
    replicas = dist.get_world_size() // parallel.fsdp
    config = DistributedConfig(fsdp_size=parallel.fsdp, dp_replicate_size=replicas, **spread)
    device, mesh = initialize_distributed_mesh(config)
    type(base).maybe_distribute_model(base, config, mesh)
    if parallel.ep > 1 and mesh is not None:
        experts.note_held(base, mesh.get_mesh("ep"))
    return device or torch.device("cpu")


def frozen_copy(model: Any) -> Any:
    """A copy of a sharded model without adapters, divided in the same way, as a reference."""
    reshard(model)
    own = model.config.distributed_config
    with torch.device("meta"):
        cls: Any = model_class(model.config, "causal_lm")
        implementation = model.config._attn_implementation
        copy = cls._from_config(_alone(model.config), dtype=model.dtype, attn_implementation=implementation)
    copy.to_empty(device=_divide(copy, Parallel(own.fsdp_size, own.ep_size)))
    with torch.no_grad():
        for new, old in zip(
            chain(copy.parameters(), copy.buffers()), chain(model.parameters(), model.buffers()), strict=True
        ):
            new.copy_(old)
    return copy.requires_grad_(False).eval()


def read_weights(model: Any, directory: str) -> list[str]:
    """`read_base` of a model that has been divided."""
    base = base_of(model)
    head = "score" if hasattr(base, "score") else "causal_lm"
    return read_base(model, meta_model(_alone(base.config), head, quantization_of(base)), directory)


def _alone(config: Any) -> Any:
    """The config of the model on one process."""
    own = type(config).from_dict(config.to_dict())
    own.__dict__.pop("distributed_config", None)
    return own


def reshard(model: Any) -> None:
    """Free the weights that a forward pass without a backward pass has left gathered (of the norm and the head): until
    then the model's parameters are not those that an optimizer or a checkpoint must have."""
    for module in base_of(model).modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
