"""Training with transformers' and TRL's trainers: a mixin that adds the balance losses, checkpoints that resume
exactly, and the files of a run. Most names are imported lazily, because importing transformers' Trainer is slow."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..kernels.token_scores import IGNORED, blockwise_loss, shifted_labels
from .run_files import append_lines, cut_file, read_lines, write_json, write_lines

if TYPE_CHECKING:
    from ..sharding import (
        PATIENCE,
        LostContact,
        Parallel,
        at,
        frozen_copy,
        in_step,
        is_sharded,
        launched_sharding,
        shard,
        wait_at_most,
    )
    from .activations import Activations, Step, step_memory
    from .arguments import RunLimits, check_batches, describe_computation, training_arguments
    from .checksums import check_whole
    from .fused_head import HeadSettings, fuse_head, with_fused_head
    from .held_out import held_out_loader, mean_of
    from .mixin import RunTrainerMixin, StopRequested
    from .plain_checkpoints import plain_checkpoint, write_plain
    from .quiet import quiet_libraries
    from .sharded import has_shards
    from .sizes import Sizes, Weight, training_sizes

_HOMES = {
    "PATIENCE": ".sharding",
    "LostContact": ".sharding",
    "Parallel": ".sharding",
    "Activations": "activations",
    "HeadSettings": "fused_head",
    "RunLimits": "arguments",
    "RunTrainerMixin": "mixin",
    "Sizes": "sizes",
    "Step": "activations",
    "StopRequested": "mixin",
    "Weight": "sizes",
    "at": ".sharding",
    "check_batches": "arguments",
    "check_whole": "checksums",
    "describe_computation": "arguments",
    "frozen_copy": ".sharding",
    "fuse_head": "fused_head",
    "has_shards": "sharded",
    "held_out_loader": "held_out",
    "in_step": ".sharding",
    "is_sharded": ".sharding",
    "launched_sharding": ".sharding",
    "mean_of": "held_out",
    "plain_checkpoint": "plain_checkpoints",
    "quiet_libraries": "quiet",
    "shard": ".sharding",
    "step_memory": "activations",
    "training_arguments": "arguments",
    "training_sizes": "sizes",
    "wait_at_most": ".sharding",
    "with_fused_head": "fused_head",
    "write_plain": "plain_checkpoints",
}

__all__ = [
    "IGNORED",
    "PATIENCE",
    "Activations",
    "HeadSettings",
    "LostContact",
    "Parallel",
    "RunLimits",
    "RunTrainerMixin",
    "Sizes",
    "Step",
    "StopRequested",
    "Weight",
    "append_lines",
    "at",
    "blockwise_loss",
    "check_batches",
    "check_whole",
    "cut_file",
    "describe_computation",
    "frozen_copy",
    "fuse_head",
    "has_shards",
    "held_out_loader",
    "in_step",
    "is_sharded",
    "launched_sharding",
    "mean_of",
    "plain_checkpoint",
    "quiet_libraries",
    "read_lines",
    "shard",
    "shifted_labels",
    "step_memory",
    "training_arguments",
    "training_sizes",
    "wait_at_most",
    "with_fused_head",
    "write_json",
    "write_lines",
    "write_plain",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
