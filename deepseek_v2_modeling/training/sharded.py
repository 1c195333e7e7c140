"""Checkpoints of models whose weights are shared among processes, which transformers' Trainer does not save.

The trained weights and the optimizer's state are tensors in safetensors files, written by torch.distributed.checkpoint
(DCP): each process writes its part, and any number of processes reads them again. No pickle is involved.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..adapters.chosen_experts import keep_chosen_parts
from ..adapters.loading import whole_embeddings
from ..checkpoints.adapter_config import WEIGHTS
from ..checkpoints.sources import SHARDS
from ..checkpoints.tensor_files import DTYPES, TensorInfo
from ..sharding import FROM_FIRST, PARTLY, read_weights, reshard

GROUPS = "param_groups.json"  # in a checkpoint: the optimizer's settings, such as learning rates
# Of a model with adapters only what is trained; full models are saved with their frozen weights, to be complete.
SAVED = {adapted: StateDictOptions(ignore_frozen_params=adapted, strict=False) for adapted in (False, True)}
WEIGHT = "weights."  # before the names of weights; the optimizer's tensors have its own
Tensors = dict[str, Any]


def save_shards(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write the weights (of a model with adapters, those of its file) and the optimizer's state; called on every
    process."""
    reshard(model)
    weights, moments, groups = _state(model, optimizer)
    if isinstance(model, PeftModel):
        weights |= {f"{WEIGHT}{name}": tensor for name, tensor in whole_embeddings(model).items()}
    writer = HuggingFaceStorageWriter(path=str(folder / SHARDS), save_distributed=True, enable_consolidation=False)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    save({**weights, **moments}, storage_writer=writer)
    if dist.get_rank() == 0:
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        (folder / GROUPS).write_text(json.dumps(settings), encoding="utf-8")


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint was written by `save_shards`."""
    return (folder / SHARDS).is_dir()


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read the weights of a checkpoint into a model, sharded or not; called on every process."""
    weights = {f"{WEIGHT}{name}": tensor for name, tensor in _weights(model).items()}
    _read(weights, folder)
    state = {name.removeprefix(WEIGHT): tensor for name, tensor in weights.items()}
    set_model_state_dict(model, state, options=SAVED[isinstance(model, PeftModel)])


def read_parts(folder: Path, name: str, info: TensorInfo) -> torch.Tensor:
    """A whole weight of a checkpoint, on a process by itself."""
    tensors: Tensors = {f"{WEIGHT}{name}": torch.empty(info.shape, dtype=DTYPES[info.dtype])}
    _read(tensors, folder)
    return tensors[f"{WEIGHT}{name}"]


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Read the optimizer's state of a checkpoint; called on every process."""
    _, moments, groups = _state(model, optimizer)
    _read(moments, folder)
    settings = json.loads((folder / GROUPS).read_text(encoding="utf-8"))
    merged = [{**group, **saved} for group, saved in zip(groups, settings, strict=True)]
    state: dict[str, dict[str, Any]] = {}
    for key, value in moments.items():
        kind, _, name = key.partition(".")
        state.setdefault(name, {})[kind] = value
    set_optimizer_state_dict(model, _bare(optimizer), {"state": state, "param_groups": merged})  # pyright: ignore


def load_whole_weights(model: nn.Module, folder: Path) -> None:
    """Give a sharded model the weights of a checkpoint that a run without sharding wrote."""
    if not isinstance(model, PeftModel):
        read_weights(model, str(folder))
        return
    state: Tensors = {}
    if dist.get_rank() == 0:
        saved = load_file(folder / WEIGHTS)
        names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        state = {name: saved[name_on_disk(name)] for name in names}
        keep_chosen_parts(model, state)
    set_model_state_dict(model, state, options=PARTLY)


def load_whole_optimizer(model: nn.Module, optimizer: Any, file: Path) -> None:
    """Give the optimizer of a sharded model the state that a run without sharding wrote, whose parameters are numbered
    in the order of the groups."""
    bare, state = _bare(optimizer), {}
    if dist.get_rank() == 0:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [[names[id(p)] for p in group["params"]] for group in bare.param_groups]
        order = [name for group in groups for name in group]
        state = {
            "state": {order[number]: values for number, values in saved["state"].items()},
            "param_groups": [{**old, "params": own} for old, own in zip(saved["param_groups"], groups, strict=True)],
        }
    set_optimizer_state_dict(model, bare, state, options=FROM_FIRST)


def _weights(model: nn.Module) -> Tensors:
    return get_model_state_dict(model, options=SAVED[isinstance(model, PeftModel)])


def _state(model: nn.Module, optimizer: Any) -> tuple[Tensors, Tensors, list[dict[str, Any]]]:
    """The trained weights and the optimizer's tensors under names of their own, and its groups of parameters."""
    found: dict[str, Any] = get_optimizer_state_dict(model, _bare(optimizer))
    moments = {f"{kind}.{name}": value for name, kinds in found["state"].items() for kind, value in kinds.items()}
    return {f"{WEIGHT}{name}": tensor for name, tensor in _weights(model).items()}, moments, found["param_groups"]


def _read(tensors: Tensors, folder: Path) -> None:
    """Read tensors in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads alone
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / SHARDS)), no_dist=not dist.is_initialized())


def name_on_disk(name: str) -> str:
    """PEFT's name of a trained parameter in an adapter's file."""
    return name.replace("modules_to_save.default.", "").replace(".default", "")


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer under accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
