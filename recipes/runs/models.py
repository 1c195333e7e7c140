"""Loads the models of a recipe's model, lora and rewards sections. Imports torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from conversations.rendering.template import install_template
from conversations.run_files import FINAL
from conversations.sections import ModelSection, ModelUse, StageRecipe, TrainingRecipe
from conversations.stage import OtherModel
from deepseek_v2_modeling.adapters import adapted_modules
from deepseek_v2_modeling.esft import trained_rows
from deepseek_v2_modeling.loading import (
    Head,
    LoraSettings,
    ModelSource,
    Weights,
    load_model,
    load_tokenizer,
    prepare_trainable,
    reason_not_to_share,
    resolve_source,
)
from deepseek_v2_modeling.training import Parallel, at, launched_sharding, shard
from recipes.processes import is_main, join_processes, main_first, say, wait_for_all
from recipes.runs.foundation import (
    check_kind,
    expert_choice,
    head_of,
    kind_of,
    lora_settings,
    source_of,
    stats_of,
)
from recipes.runs.new_model import make_model
from recipes.runs.training_fields import trl_config

SHARDING = ("fsdp", "deepspeed")  # fields of training
MERGE_DIR = "base"  # in a run directory: the model that the run starts from, if an adapter had to be merged


def ensure_model(path: str, preset: str | None, seed: int) -> None:
    """Create the preset's model at `path` if there is none, in the main process."""
    missing = preset is not None and not Path(path).exists()
    wait_for_all()
    if missing and preset is not None and is_main():
        say(f"{path} does not exist: creating it with preset {preset}, seed {seed}")
        make_model(Path(path), preset, seed)
    wait_for_all()


def open_source(section: ModelSection, seed: int) -> tuple[ModelSource, Any]:
    """The model's files, created from the preset if missing, and its tokenizer with our template."""
    ensure_model(section.path, section.preset, seed)
    source = resolve_source(section.path)
    tokenizer = load_tokenizer(source)
    install_template(tokenizer, source.settings.model_type)
    return source, tokenizer


def runtime_lora(recipe: TrainingRecipe) -> LoraSettings | None:
    """The recipe's adapters as trained: without dropout if the trainer disables all dropout, which is reported."""
    lora = lora_settings(recipe.lora) if recipe.lora else None
    if lora is None or not lora.dropout or not getattr(trl_config(recipe), "disable_dropout", False):
        return lora
    say(f"lora.dropout is {lora.dropout:g} but training.disable_dropout is true: there is no dropout")
    return replace(lora, dropout=0.0)


def load_for_training(recipe: TrainingRecipe, source: ModelSource, run_dir: Path) -> Any:
    """Load the model as the stage trains it. An adapter that has to be merged first goes to <run_dir>/base."""
    section, lora = recipe.model, runtime_lora(recipe)

    def load(weights: Weights = "read") -> Any:
        return prepare_trainable(
            source,
            lora=lora,
            experts=expert_choice(recipe),
            merge_dir=run_dir / MERGE_DIR,
            head=head_of(recipe),
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            config=section.config,
            heads=recipe.score_heads,
            router=recipe.trains_router,
            weights=weights,
            quantization=section.quantization,
            # Adapters that are added to shared weights later would not be shared.
            reference=recipe.parallel is not None and recipe.lora is not None and recipe.uses_reference,
        )

    if recipe.parallel is not None:
        join_processes()
        with at("loading the model"):
            return shard(load, Parallel(recipe.parallel.fsdp, recipe.parallel.ep))
    return main_first(load)


def load_frozen(section: ModelSection, source: ModelSource, head: Head) -> Any:
    """Load a model for evaluation or chat."""
    check_kind(section.path, kind_of(source), head)
    return load_model(
        source,
        head=head,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        config=section.config,
        quantization=section.quantization,
    )


def load_other_models(recipe: StageRecipe, stage_source: ModelSource, stage_model: Any) -> dict[str, OtherModel]:
    """Load and freeze the models that a stage uses besides its own; returned by their keys in the recipe. Adapters of
    the base that the stage's own model is on use its weights; others say why they have weights of their own, such as
    those on a device of their own.

    Raises:
        ToolkitError, ModelError: as `source_of`.
    """
    section, models = recipe.model, {}
    for use in recipe.other_models():
        path, source = Path(use.path), source_of(use)
        if source is None:
            say(f"{use.key}: {path} does not exist; using a random score head on {section.path} instead")
        base = stage_model if source and shares_base(recipe, use, source, stage_model) else None
        model = load_model(
            source or stage_source,
            head=use.head,
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            on=base,
            quantization=section.quantization,
        )
        stats = stats_of(use, source) if source else None
        name = path.parent.name if path.name == FINAL else path.name
        tokenizer = load_tokenizer(source or stage_source)
        install_template(tokenizer, model.config.model_type)
        models[use.key] = OtherModel(name, model, tokenizer, stats, use.device)
    return models


def shares_base(recipe: StageRecipe, use: ModelUse, source: ModelSource, stage_model: Any) -> bool:
    """Whether a model uses the base weights of the stage's own; says so, or why not."""
    fields = recipe.training if isinstance(recipe, TrainingRecipe) else {}
    sharded = any(fields.get(name) for name in SHARDING) or launched_sharding() is not None
    sharded = sharded or (isinstance(recipe, TrainingRecipe) and recipe.parallel is not None)
    if use.device is not None:
        reason = f"it runs on a device of its own, {use.device}"
    elif sharded:
        reason = "this stage shards its weights"
    else:
        reason = reason_not_to_share(stage_model, source, recipe.model.dtype)
    if reason is None:
        say(f"{use.key}: runs on the weights of this stage's base, {source.base}")
    else:
        say(f"{use.key}: has weights of its own in memory: {reason}")
    return reason is None


def adapted_table(model: Any) -> list[dict[str, Any]]:
    """What LoRA adapts, for the manifest; for a model without adapters, how many parameters are trained."""
    if hasattr(model, "peft_config"):
        return adapted_modules(model)
    if rows := trained_rows(model):
        return rows
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    some = len(trained) < len(list(model.parameters()))
    return [{"projection": "all weights except the routers'" if some else "all weights", "parameters": sum(trained)}]


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of adapted modules as text."""
    lines = []
    for row in rows:
        rank = f"{row['layers']} x rank {row['rank']}, alpha {row['alpha']:g}, " if "rank" in row else ""
        dropout = f"dropout {row['dropout']:g}, " if row.get("dropout") else ""
        experts = f"{row['experts']:,} of {row['of_experts']:,} experts, " if "experts" in row else ""
        lines.append(f"  {row['projection']}: {rank}{dropout}{experts}{row['parameters']:,} weights")
    return [f"trains {sum(row['parameters'] for row in rows):,} weights", *lines]
