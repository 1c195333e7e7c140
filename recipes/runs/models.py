"""From a recipe's model, lora and rewards sections to loaded models. Imports torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from conversations.rendering.template import install_template
from conversations.sections import ModelSection, TrainingRecipe
from deepseek_v2_modeling.adapters import adapted_modules
from deepseek_v2_modeling.esft import trained_rows
from deepseek_v2_modeling.loading import (
    Head,
    LoraSettings,
    ModelSource,
    load_model,
    load_tokenizer,
    prepare_trainable,
    resolve_source,
)
from recipes.processes import is_main, say, wait_for_all
from recipes.runs.foundation import (
    check_kind,
    expert_choice,
    head_of,
    kind_of,
    lora_settings,
    reward_source,
    reward_stats,
)
from recipes.runs.new_model import make_model
from rl.config import RewardEntry, RlRecipe
from rl.rewards import Reward, RewardModelReward, RuleReward
from sft.config import SftRecipe

MERGE_DIR = "base"  # in a run directory: the model that the run starts from, where an adapter had to be merged


def ensure_model(path: str, preset: str | None, seed: int) -> None:
    """Make the preset's model at `path` when there is none, by the main process."""
    missing = preset is not None and not Path(path).exists()
    wait_for_all()
    if missing and preset is not None and is_main():
        say(f"{path} is not there: making it, preset {preset}, seed {seed}")
        make_model(Path(path), preset, seed)
    wait_for_all()


def open_source(section: ModelSection, seed: int) -> tuple[ModelSource, Any]:
    """The model's files, made from the preset where missing, and its tokenizer with our template."""
    ensure_model(section.path, section.preset, seed)
    source = resolve_source(section.path)
    tokenizer = load_tokenizer(source)
    install_template(tokenizer)
    return source, tokenizer


def runtime_lora(recipe: TrainingRecipe) -> LoraSettings | None:
    """The recipe's adapters as they train: without dropout where the trainer turns all of it off, which is told."""
    lora = lora_settings(recipe.lora) if recipe.lora else None
    off = recipe.training.get("disable_dropout", not isinstance(recipe, SftRecipe))  # on in TRL's reward trainer
    if lora is None or not (lora.dropout and off):
        return lora
    say(f"lora.dropout is {lora.dropout:g} but training.disable_dropout is true: there is no dropout")
    return replace(lora, dropout=0.0)


def load_for_training(recipe: TrainingRecipe, source: ModelSource, run_dir: Path) -> Any:
    """The model as the stage trains it. A merge that it needs is written to <run_dir>/base, once."""
    section, lora = recipe.model, runtime_lora(recipe)

    def load() -> Any:
        return prepare_trainable(
            source,
            lora=lora,
            experts=expert_choice(recipe),
            merge_dir=run_dir / MERGE_DIR,
            head=head_of(recipe),
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            config=section.config,
        )

    return _main_first(load)


def load_frozen(section: ModelSection, source: ModelSource, head: Head) -> Any:
    """The model for evaluation or chat."""
    check_kind(section.path, kind_of(source), head)
    return load_model(
        source,
        head=head,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        config=section.config,
    )


def load_rewards(recipe: RlRecipe, policy: ModelSource) -> list[Reward]:
    """The terms of a recipe's reward, its reward models loaded and frozen.

    Raises:
        ToolkitError, ModelError: as `reward_source`, or a rule that is not known.
    """
    rewards: list[Reward] = []
    for index, entry in enumerate(recipe.rewards):
        if entry.rule is not None:
            rewards.append(RuleReward(entry.rule, entry.weight, entry.on_error))
        else:
            rewards.append(_reward_model(recipe, entry, policy, f"rewards.{index}"))
    names = [reward.name for reward in rewards]
    for index, reward in enumerate(rewards):
        if names.count(names[index]) > 1:  # TRL logs by name
            reward.__name__ = f"{names[index]}_{index}"
    return rewards


def _reward_model(recipe: RlRecipe, entry: RewardEntry, policy: ModelSource, key: str) -> Reward:
    path = Path(entry.model or "")
    source = reward_source(entry)
    if source is None:
        say(f"{key}.model: {path} is not there; a random score head on {recipe.model.path} stands in for it")
    model = load_model(
        source or policy, head="score", dtype=recipe.model.dtype, attn_implementation=recipe.model.attn_implementation
    )
    return RewardModelReward(
        path.parent.name if path.name == "final" else path.name,
        model,
        load_tokenizer(source or policy),
        stats=reward_stats(entry, source) if source else None,
        clip=entry.clip,
        weight=entry.weight,
        on_error=entry.on_error,
    )


def adapted_table(model: Any) -> list[dict[str, Any]]:
    """What LoRA adapts, for the manifest; for a model without adapters, how much of it is trained."""
    if hasattr(model, "peft_config"):
        return adapted_modules(model)
    if rows := trained_rows(model):
        return rows
    parameters = list(model.parameters())
    return [
        {
            "projection": "all weights",
            "parameters": sum(p.numel() for p in parameters if p.requires_grad),
        }
    ]


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of adapted modules as text."""
    lines = []
    for row in rows:
        rank = f"{row['layers']} x rank {row['rank']}, alpha {row['alpha']:g}, " if "rank" in row else ""
        dropout = f"dropout {row['dropout']:g}, " if row.get("dropout") else ""
        experts = f"{row['experts']:,} of {row['of_experts']:,} experts, " if "experts" in row else ""
        lines.append(f"  {row['projection']}: {rank}{dropout}{experts}{row['parameters']:,} weights")
    return [f"trains {sum(row['parameters'] for row in rows):,} weights", *lines]


def _main_first(load: Any) -> Any:
    """The main process loads first: what it writes on the way, the others find."""
    if is_main():
        loaded = load()
        wait_for_all()
        return loaded
    wait_for_all()
    return load()
