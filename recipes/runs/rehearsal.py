"""Runs one step of a stage's trainer on a toy model, to find settings that TRL or transformers refuse only then.

Their trainers, optimizers, schedulers, data loaders and generation check many fields when they are created or first
used, which in a real run is after the model's weights have been loaded.
"""

import contextlib
import gc
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from conversations.errors import ToolkitError
from conversations.scratch import scratch_directory
from conversations.sections import StageRecipe, TrainingRecipe
from conversations.stage import provided
from deepseek_v2_modeling import DeepseekV2Config
from deepseek_v2_modeling.adapters import apply_lora
from deepseek_v2_modeling.loading import TASKS, model_class
from deepseek_v2_modeling.training import StopRequested
from recipes.disk import disk_fault
from recipes.processes import world_size
from recipes.runs.foundation import head_of, lora_settings
from recipes.stages import training_of

_SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
_BATCH = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
_NOTHING = 50  # above every log level


def rehearse(recipe: StageRecipe, settings: DeepseekV2Config | None, tokenizer: Any) -> None:
    """Train a toy version of the model for one step with the recipe's settings and the smallest batch.

    Skipped in a launch of several processes, and with vLLM, which needs a model on disk.

    Raises:
        ToolkitError: the libraries refuse a field of `training`; it is named if leaving it out helps.
        OSError, ModelError: the disk for temporary files is full.
        KeyboardInterrupt: interrupted by a signal.
    """
    if settings is None or world_size() > 1:
        return
    try:
        _try(recipe, settings, tokenizer)
    except Exception as error:
        if disk_fault(error):
            raise
        raise ToolkitError(f"{_culprit(recipe, settings, tokenizer)}: {' '.join(str(error).split())}") from error


def _culprit(recipe: StageRecipe, settings: DeepseekV2Config, tokenizer: Any) -> str:
    """The field without which the step succeeds."""
    if not isinstance(recipe, TrainingRecipe):
        return "model"
    for key, value in recipe.training.items():
        without = {name: item for name, item in recipe.training.items() if name != key}
        with contextlib.suppress(Exception):
            _try(recipe.model_copy(update={"training": without}), settings, tokenizer)
            return f"training.{key} is {value!r}"
    return "training"


def _try(recipe: StageRecipe, settings: DeepseekV2Config, tokenizer: Any) -> None:
    with _unnoticed():
        model = toy_model(recipe, settings)
        if not isinstance(recipe, TrainingRecipe):
            return
        training = training_of(recipe)
        small = recipe.model_copy(update={"training": {**recipe.training, **_BATCH, **training.rehearsal_training}})
        trainer = provided(training.rehearsal)(small, model, tokenizer, scratch_directory())
        trainer.add_callback(_OneStep())
        try:
            trainer.train()
        except StopRequested:
            raise KeyboardInterrupt from None  # its message would not apply to the run


def toy_model(recipe: StageRecipe, settings: DeepseekV2Config) -> Any:
    """A small random model with the same kinds of layers and vocabulary size, and the recipe's adapters."""
    head = head_of(recipe)
    values = {**settings.to_dict(), **_SIZES, "q_lora_rank": settings.q_lora_rank and 8}
    values |= {"n_routed_experts": settings.n_routed_experts and 4, "n_shared_experts": settings.n_shared_experts and 1}
    values.pop("mlp_layer_types", None)  # of as many layers as the model has
    config = type(settings)(**{**values, "num_labels": settings.num_labels})
    model = model_class(config, head)._from_config(
        config, attn_implementation=recipe.model.attn_implementation, dtype=getattr(torch, recipe.model.dtype)
    )
    if isinstance(recipe, TrainingRecipe) and recipe.lora is not None:
        return apply_lora(model, lora_settings(recipe.lora).config(TASKS[head]))
    return model


class _OneStep(TrainerCallback):
    """Stops training after the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """Suppress output and warnings, and restore the random state afterwards."""
    frozen = gc.get_freeze_count()  # by the caller, and then it stays so
    if not frozen:
        gc.freeze()  # the Trainer collects garbage, which with many objects takes longer than everything else
    verbosity = logging.get_verbosity()
    logging.set_verbosity(_NOTHING)
    silence = io.StringIO()
    try:
        with (
            torch.random.fork_rng(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if not frozen:
            gc.unfreeze()
