"""Checks `training` and `model.config` against the classes that they configure. Imports torch and trl."""

from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from conversations.errors import ToolkitError
from conversations.sections import TrainingRecipe
from conversations.stage import provided
from deepseek_v2_modeling import ModelError
from recipes.data.mixing import source_names
from recipes.runs.training_bounds import check_bounds
from recipes.stages import training_of

# Fields of the TRL configs that the toolkit sets itself, and what to use in the recipe instead.
OWNED = {
    "output_dir": "write output_dir at the recipe's top level",
    "seed": "write seed at the recipe's top level",
    "data_seed": "write seed at the recipe's top level",
    "full_determinism": "runs are seeded by the recipe's seed",
    "router_aux_loss_coef": "write model.config.aux_loss_alpha: the balance losses are the model's own",
    "model_init_kwargs": "write model.dtype, model.attn_implementation and model.config",
    "trust_remote_code": "the model's code is part of the toolkit",
    "bf16": "write model.dtype",
    "fp16": "write model.dtype",
    "bf16_full_eval": "write model.dtype",
    "fp16_full_eval": "write model.dtype",
    "chat_template_path": "the template is the tokenizer's; dsv2 init writes it",
    "eos_token": "the tokenizer's eos token is used",
    "pad_token": "the tokenizer's pad token is used",
    "assistant_only_loss": "write format.train_on",
    "completion_only_loss": "write format.train_on",
    "dataset_text_field": "write data.0.columns",
    "dataset_kwargs": "rows are rendered before the trainer sees them; see data and format",
    "remove_unused_columns": "rows are rendered before the trainer sees them; see data and format",
    "truncation_mode": "write format.too_long",
    "reward_weights": "write rewards.0.weight, and so on",
    "resume_from_checkpoint": "start the same command again: it resumes from the newest checkpoint",
    "local_rank": "torchrun and accelerate launch set it",
    "use_liger_kernel": "Liger's DeepSeek-V2 kernels are for transformers' own class: in this one they would put dense "
    "blocks in the place of the experts; leave it out",
    "liger_kernel_config": "Liger's kernels do not fit this model's classes; leave it out",
    "restore_callback_states_from_checkpoint": "a resumed run continues exactly; leave it out",
    "do_train": "the stage trains; leave it out",
    "do_eval": "give eval_data",
    "do_predict": "use dsv2 eval",
}


def check_training(recipe: TrainingRecipe) -> None:
    """Check the `training` section of a recipe.

    Raises:
        ModelError: a dtype that this machine cannot train in, or evaluation without evaluation rows.
        ToolkitError: a field that the TRL config does not have or the toolkit sets itself, or a wrong value.
    """
    config_name = training_of(recipe).config
    fields = config_fields(config_name)
    for key, value in recipe.training.items():
        if key in OWNED:
            raise ToolkitError(f"training.{key} is set by the toolkit; {OWNED[key]}")
        if key not in fields and key in type(recipe).model_fields:
            raise ToolkitError(f'unknown key "training.{key}"; write {key} at the recipe\'s top level')
        if key not in fields:
            raise ToolkitError(
                _unknown(f"training.{key}", key, fields, f"{config_name.rpartition(':')[2]} has no such field")
            )
        try:
            TypeAdapter(fields[key], config=_LENIENT).validate_python(value, strict=True)
        except ValidationError as error:
            reasons = dict.fromkeys(detail["msg"].replace("Input should be ", "must be ") for detail in error.errors())
            raise ToolkitError(f"training.{key}: {' or '.join(reasons)}, not {value!r}") from None
    check_bounds(recipe.training)
    _check_patterns(recipe.training)
    _check_trackers(recipe.training.get("report_to"))
    _try_config(recipe)
    _check_metric(recipe)


def check_model_config(config: dict[str, Any]) -> None:
    """Check the keys under `model.config`; their values are checked when the config is created.

    Raises:
        ToolkitError: a key that no config of the family has.
    """
    if not config:
        return
    from deepseek_v2_modeling.loading import config_fields

    fields = config_fields()
    for key in config:
        if key not in fields:
            raise ToolkitError(_unknown(f"model.config.{key}", key, fields, "the model's config has no such field"))


def config_class(name: str) -> Any:
    """The TRL config class with this name, or "module:name"."""
    module, _, own_name = name.rpartition(":")
    return getattr(import_module(module or "trl"), own_name)


def setting(recipe: TrainingRecipe, name: str) -> Any:
    """The recipe's value of a field of its TRL config, or that config's default; None if it has no such field."""
    return recipe.training.get(name, getattr(config_class(training_of(recipe).config), name, None))


_LENIENT = ConfigDict(arbitrary_types_allowed=True)


@cache
def config_fields(name: str) -> dict[str, Any]:
    """The fields of a TRL config class, with their types."""
    import dataclasses

    cls = config_class(name)
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _try_config(recipe: TrainingRecipe) -> None:
    """Create the config once: TRL and transformers then check that its fields are consistent."""
    try:
        trl_config(recipe)
    except ModelError:
        raise
    except Exception as error:  # anything the libraries raise for a field that they cannot use
        raise ToolkitError(f"{_culprit(recipe)}: {' '.join(str(error).split())}") from None


def trl_config(recipe: TrainingRecipe) -> Any:
    """The TRL config of a recipe, built as its stage builds it."""
    return provided(training_of(recipe).planned_config)(recipe)


def _culprit(recipe: TrainingRecipe) -> str:
    """The field without which TRL accepts the others; `training` as a whole if there is none."""
    for key, value in recipe.training.items():
        without = {name: item for name, item in recipe.training.items() if name != key}
        with suppress(Exception):
            trl_config(recipe.model_copy(update={"training": without}))
            return f"training.{key} is {value!r}"
    return "training"


def _check_patterns(training: dict[str, Any]) -> None:
    """Check regular expressions, which are matched against all module names and must not take forever."""
    from deepseek_v2_modeling.adapters import pattern_fault

    sharding = training.get("fsdp_config")
    ignored = sharding.get("ignored_modules") if isinstance(sharding, dict) else None
    fields = {"optim_target_modules": training.get("optim_target_modules"), "fsdp_config.ignored_modules": ignored}
    for key, value in fields.items():
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
            if isinstance(pattern, str) and (fault := pattern_fault(pattern)):
                raise ToolkitError(f"training.{key}: {pattern[:60]!r} {fault}")


def _check_trackers(report_to: Any) -> None:
    """Check `report_to` early: TRL would fail only after the model is loaded."""
    from transformers.integrations import integration_utils as trackers

    requested = {report_to} if isinstance(report_to, str) else set(report_to or ())
    names = sorted(requested - {"none", "all"})
    if not names:
        return
    supported, installed = sorted(trackers.INTEGRATION_TO_CALLBACK), trackers.get_available_reporting_integrations()
    for name in names:
        if name not in supported:
            raise ToolkitError(f"training.report_to: {name!r} is not one of none, all, {', '.join(supported)}")
        if name not in (*installed, "flyte", "azure_ml"):  # transformers does not report these two as installed
            raise ToolkitError(f"training.report_to: {name} is not installed; pip install {name}, or leave it out")


def _check_metric(recipe: TrainingRecipe) -> None:
    """Check that every evaluation reports the metric that selects the best checkpoint."""
    metric, evaluated = recipe.training.get("metric_for_best_model"), training_of(recipe).evaluated
    if not evaluated or metric is None:
        return
    apart = [source_names(rows.entries) for rows in recipe.row_lists() if rows.apart]
    available = [evaluated[0], *(f"{name}_loss" for names in apart for name in names), *evaluated[1:]]
    if metric.removeprefix("eval_") not in available:
        raise ToolkitError(f"training.metric_for_best_model: {metric!r} is not one of {', '.join(available)}")


def _unknown(path: str, key: str, names: Any, otherwise: str) -> str:
    near = get_close_matches(key, sorted(names), n=1, cutoff=0.6)
    if near:
        return f'unknown key "{path}", did you mean "{path.removesuffix(key)}{near[0]}"?'
    return f'unknown key "{path}": {otherwise}'
