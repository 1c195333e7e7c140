"""Training with transformers' and TRL's trainers: a mixin that adds the balance losses, checkpoints that resume
exactly, and the files of a run. Most names are imported lazily, because importing transformers' Trainer is slow."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..kernels.token_scores import IGNORED, blockwise_loss, shifted_labels
from .run_files import append_lines, cut_file, read_lines, write_json, write_lines

if TYPE_CHECKING:
    from .arguments import RunLimits, check_batches, describe_computation, training_arguments
    from .checksums import check_whole
    from .fused_head import HeadSettings, fuse_head, with_fused_head
    from .mixin import RunTrainerMixin, StopRequested
    from .quiet import quiet_libraries

_HOMES = {
    "HeadSettings": "fused_head",
    "RunLimits": "arguments",
    "RunTrainerMixin": "mixin",
    "StopRequested": "mixin",
    "check_batches": "arguments",
    "check_whole": "checksums",
    "describe_computation": "arguments",
    "fuse_head": "fused_head",
    "quiet_libraries": "quiet",
    "training_arguments": "arguments",
    "with_fused_head": "fused_head",
}

__all__ = [
    "IGNORED",
    "HeadSettings",
    "RunLimits",
    "RunTrainerMixin",
    "StopRequested",
    "append_lines",
    "blockwise_loss",
    "check_batches",
    "check_whole",
    "cut_file",
    "describe_computation",
    "fuse_head",
    "quiet_libraries",
    "read_lines",
    "shifted_labels",
    "training_arguments",
    "with_fused_head",
    "write_json",
    "write_lines",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
