"""LoRA adapters: creating, loading, merging into the base, and converting to and from other layouts."""

from ..checkpoints.adapter_config import CONFIG, WEIGHTS, pattern_fault
from ..checkpoints.tensor_files import Progress
from .copies import copied_bytes, merged_copy
from .engine_weights import check_mergeable, hub_weights
from .exporting import export_adapter
from .files import match_adapter
from .importing import import_adapter
from .loading import load_adapter
from .lora import adapted_modules, apply_lora, check_new_targets, lora_config
from .merge import merge_lora

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Progress",
    "adapted_modules",
    "apply_lora",
    "check_mergeable",
    "check_new_targets",
    "copied_bytes",
    "export_adapter",
    "hub_weights",
    "import_adapter",
    "load_adapter",
    "lora_config",
    "match_adapter",
    "merge_lora",
    "merged_copy",
    "pattern_fault",
]
