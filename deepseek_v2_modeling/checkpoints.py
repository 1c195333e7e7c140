"""Which tensors of a checkpoint do not fit the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .configuration import DeepseekV2Config
from .errors import ModelError

SHOWN = 5
Shapes = dict[str, tuple[int, ...]]


def file_shapes(directory: str | Path) -> Shapes:
    """{name: shape} of all tensors in a directory's safetensors files; reads their headers only."""
    shapes: Shapes = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def hub_shapes(cls: type[PreTrainedModel], config: DeepseekV2Config) -> Shapes:
    """{name: shape} of the tensors that a checkpoint of this model has in the hub's layout."""
    with torch.device("meta"):
        model: Any = cls(config)
    return {name: tuple(t.shape) for name, t in revert_weight_conversion(model, model.state_dict()).items()}


def find_faults(found: Shapes, wanted: Shapes) -> dict[str, list[str]]:
    """{"missing" | "unexpected" | "misshapen": names}."""
    shared = found.keys() & wanted.keys()
    return {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "misshapen": sorted(f"{k} {list(found[k])}, not {list(wanted[k])}" for k in shared if found[k] != wanted[k]),
    }


def raise_faults(base: str, faults: Mapping[str, list[str]], head: str) -> None:
    """Raises ModelError for the first kind of fault, but not for the head that a reward model replaces."""
    new_head, old_head = ("score.", "lm_head.") if head == "score" else ((), "score.")
    excused = {"missing": new_head, "unexpected": old_head, "misshapen": ()}
    for what, names in faults.items():
        names = [name for name in names if not name.startswith(excused[what])]
        if names:
            raise ModelError(f"{base}: {len(names)} tensors are {what}: {'; '.join(names[:SHOWN])}")


def raise_faults_of_files(base: str, cls: type[PreTrainedModel], config: DeepseekV2Config, head: str) -> None:
    """`raise_faults` by the names that tensors have in the files of a local directory.

    transformers speaks of the fused experts when one of them is missing or has another shape, or raises
    RuntimeError without any name when they do not stack.
    """
    if found := file_shapes(base):
        raise_faults(base, find_faults(found, hub_shapes(cls, config)), head)
