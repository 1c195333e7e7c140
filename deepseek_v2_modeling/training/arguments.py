"""Turns a recipe's `training` section into arguments for a TRL or transformers training config."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from ..errors import ModelError
from ..kernels.float32_products import float32_is_faster
from ..sharding import PATIENCE


@dataclass(frozen=True)
class RunLimits:
    """Conditions under which a run stops early.

    on_nan: at a loss or gradient that is not finite, stop the run or skip the update.
    max_seconds: end training after this many seconds, as if the last step were reached.
    max_tokens: the same after training on this many tokens, including prompts but not padding.
    early_stopping_patience: the same after this many consecutive evaluations that do not improve on the best one.
    """

    on_nan: Literal["stop", "skip"] = "stop"
    max_seconds: float | None = None
    max_tokens: int | None = None
    early_stopping_patience: int | None = None


# Fields, and their values that go by the results of evaluations while training.
_BY_EVALUATIONS: dict[str, tuple[Any, ...]] = {
    "load_best_model_at_end": (True,),
    "save_strategy": ("best",),
    "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"),
}


def training_arguments(
    training: dict[str, Any],
    *,
    run_dir: Path,
    seed: int,
    dtype: str,
    limits: RunLimits,
    has_eval: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for a TRL (or transformers) training config: the recipe's, our defaults, and the fields that
    the toolkit sets.

    Raises:
        ModelError: this machine cannot train in the dtype, or evaluation is requested without rows for it.
    """
    _check_evaluations(training, limits, has_eval)
    on_cpu = runs_on_cpu(training)
    if on_cpu and dtype == "float16":
        raise ModelError("model.dtype float16 trains on a GPU only; use bfloat16 or float32")
    defaults = {
        "logging_steps": 1,
        "save_total_limit": 2,
        "dataloader_pin_memory": not on_cpu,
        "per_device_eval_batch_size": training.get("per_device_train_batch_size", 8),
        "ddp_find_unused_parameters": False,
        "ddp_timeout": PATIENCE,
        "report_to": "none",
        "metric_for_best_model": "loss" if limits.early_stopping_patience is not None else None,
    }
    ours = {
        "output_dir": str(run_dir),
        "seed": seed,
        "data_seed": seed,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        "disable_tqdm": True,
        "logging_nan_inf_filter": limits.on_nan == "skip",
        "restore_callback_states_from_checkpoint": True,  # the count of evaluations without improvement
    }
    return {**defaults, **_with_known_names(training), **ours}


def _check_evaluations(training: dict[str, Any], limits: RunLimits, has_eval: bool) -> None:
    """Raise ModelError for a field that needs evaluations where there will be none."""
    evaluates = str(training.get("eval_strategy", "no")) != "no"
    for key in ("eval_strategy", "eval_on_start"):
        value = training.get(key)
        if not has_eval and (evaluates if key == "eval_strategy" else value):
            raise ModelError(f"training.{key} is {_as_yaml(value)}, and there is no eval_data to evaluate on")
    if evaluates:
        return
    if limits.early_stopping_patience is not None:
        raise ModelError("early_stopping_patience counts evaluations: give eval_data and training.eval_strategy")
    for key, values in _BY_EVALUATIONS.items():
        if (value := training.get(key)) in values:
            raise ModelError(
                f"training.{key} is {_as_yaml(value)}, which goes by evaluations: give eval_data and "
                "training.eval_strategy"
            )


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def runs_on_cpu(training: dict[str, Any]) -> bool:
    """Whether training with these settings uses the CPU of this machine."""
    return bool(training.get("use_cpu", not torch.cuda.is_available()))


def describe_computation(training: dict[str, Any], dtype: str) -> str:
    """A phrase that states the device and dtype in which training computes on this machine."""
    if not runs_on_cpu(training):
        return f"{dtype} on {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    on_cpu = f"{dtype} on the CPU ({threads} thread{'s' if threads > 1 else ''})"
    if dtype != "bfloat16":
        return on_cpu
    if float32_is_faster():
        return f"{on_cpu}; large products in float32, which is faster on this CPU"
    return f"{on_cpu}; large products in bfloat16, which is faster on this CPU"


def check_batches(arguments: TrainingArguments, rows: int) -> None:
    """Raise ModelError if the rows (packs, pairs) do not fill one batch and incomplete batches are dropped."""
    batch = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and rows < batch:
        raise ModelError(
            f"training.dataloader_drop_last is true and {rows:,} rows are fewer than one batch of {batch:,}: nothing "
            "would be trained; lower training.per_device_train_batch_size, or leave dataloader_drop_last out"
        )


def _with_known_names(training: dict[str, Any]) -> dict[str, Any]:
    """`gradient_checkpointing` under the name that this version of transformers uses; off unless the recipe enables
    it."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    named = {key.replace(old, new) if new in known else key: value for key, value in training.items()}
    return {new if new in known else old: False, **named}
