"""From a recipe's model, lora and rewards sections to loaded models. Imports torch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.sections import LoraSection, ModelSection, TrainingRecipe
from conversations.template import has_other_template, install_template
from deepseek_v2_modeling.adapters import WEIGHTS
from deepseek_v2_modeling.chosen_full import trained_rows
from deepseek_v2_modeling.configuration import DeepseekV2Config
from deepseek_v2_modeling.expert_choice import ExpertChoice, read_choice
from deepseek_v2_modeling.loading import (
    Head,
    LoraSettings,
    ModelSource,
    apply_settings,
    check_lora_targets,
    load_model,
    load_tokenizer,
    prepare_trainable,
    read_settings,
    resolve_source,
)
from deepseek_v2_modeling.lora import adapted_modules
from deepseek_v2_modeling.presets import PRESETS
from deepseek_v2_modeling.tensor_files import read_header
from recipes.init import make_model
from recipes.ranks import is_main, say, wait_for_all
from reward.config import RewardRecipe
from rl.config import RewardEntry, RlRecipe
from rl.rewards import Reward, RewardModelReward, RewardStats, RuleReward
from sft.config import SftRecipe


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
    tell_template(section.path, tokenizer)
    install_template(tokenizer)
    return source, tokenizer


def tell_template(path: str, tokenizer: Any) -> None:
    """Say where a model's own chat template will not be used."""
    if has_other_template(tokenizer):
        say(f"{path}: its own chat template is not used; rows are rendered, and results saved, with DeepSeek-V2's")


def lora_settings(section: LoraSection | None) -> LoraSettings | None:
    """The model floor's form of a `lora` section."""
    if section is None:
        return None
    values: dict[str, Any] = section.model_dump(include={"r", "alpha", "dropout", "rslora"})
    return LoraSettings(tuple(section.targets), **values)


def expert_choice(recipe: TrainingRecipe) -> ExpertChoice | None:
    """The routed experts that the recipe wants to train; None for all. Raises ModelError for a file of no use."""
    file = recipe.lora.experts_file if recipe.lora else recipe.experts_file
    return read_choice(file) if file else None


def check_experts(recipe: TrainingRecipe) -> None:
    """Look at the experts file before anything is loaded; against the model, where that is on this machine.

    Raises:
        ModelError: the file is missing, no experts file, or for another model.
    """
    choice = expert_choice(recipe)
    if choice is not None and Path(recipe.model.path).exists():
        choice.check(read_settings(resolve_source(recipe.model.path).base))


def check_lora(recipe: TrainingRecipe, source: ModelSource | None = None) -> None:
    """Look for LoRA targets that match nothing in the model, by its config alone, and at the file of its adapter.

    source: the model's files, once they are known; None takes those of a path on this machine, or the preset's.

    Raises:
        ModelError: such a target, wrong values under `model.config`, or a file that is cut short.
    """
    lora, section = lora_settings(recipe.lora), recipe.model
    if source is None and Path(section.path).exists():
        source = resolve_source(section.path)
    if source is not None:
        settings = read_settings(source.base)
        if source.adapter:
            read_header(Path(source.adapter) / WEIGHTS)
    elif section.preset in PRESETS:
        settings = DeepseekV2Config(**PRESETS[section.preset])
    else:
        return  # a name of the hub, or what opening it will refuse
    settings = apply_settings(settings, head_of(recipe), section.config)
    if lora is not None:
        check_lora_targets(settings, lora, head_of(recipe))


def head_of(recipe: TrainingRecipe) -> Head:
    """The kind of model that a stage trains."""
    return "score" if isinstance(recipe, RewardRecipe) else "causal_lm"


def runtime_lora(recipe: TrainingRecipe) -> LoraSettings | None:
    """The recipe's adapters as they train: without dropout where the trainer turns all of it off, which is told."""
    lora = lora_settings(recipe.lora)
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
            merge_dir=run_dir / "base",
            head=head_of(recipe),
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            config=section.config,
        )

    return _main_first(load)


def load_frozen(section: ModelSection, source: ModelSource, head: Head) -> Any:
    """The model for evaluation or chat."""
    check_kind(section.path, source, head)
    return load_model(
        source,
        head=head,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        config=section.config,
    )


def check_kind(path: str, source: ModelSource, head: Head) -> None:
    """Refuse a chat model as a reward model, which would score at random, and the other way round.

    Raises:
        ToolkitError: the path is a model of the other kind.
    """
    if is_reward_model(source) and head == "causal_lm":
        raise ToolkitError(f"{path} is a reward model: it scores answers and writes none; name a chat model")
    if not is_reward_model(source) and head == "score":
        raise ToolkitError(f"{path} is a chat model, not a reward model; train one with: dsv2 reward RECIPE")


def is_reward_model(source: ModelSource) -> bool:
    """Whether the files hold a score head. A hub name that is not on this machine counts as a chat model."""
    if source.adapter:
        return _read(Path(source.adapter) / "adapter_config.json").get("task_type") == "SEQ_CLS"
    kinds = _read(Path(source.base) / "config.json").get("architectures") or []
    return any("SequenceClassification" in kind for kind in kinds)


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


def check_rewards(recipe: RlRecipe) -> None:
    """Look for the reward models and rules before anything is loaded.

    Raises:
        ToolkitError, ModelError: as `load_rewards`.
    """
    for entry in recipe.rewards:
        if entry.rule is not None:
            RuleReward(entry.rule)
        elif source := reward_source(entry):
            _stats(entry, source)


def reward_source(entry: RewardEntry) -> ModelSource | None:
    """The files of a reward model; None where a random one stands in for it.

    Raises:
        ToolkitError, ModelError: it is missing, or no reward model.
    """
    path = entry.model or ""
    if entry.if_missing == "random" and not Path(path).exists():
        return None
    source = resolve_source(path)
    check_kind(path, source, "score")
    return source


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
        stats=_stats(entry, source) if source else None,
        clip=entry.clip,
        weight=entry.weight,
        on_error=entry.on_error,
    )


def _stats(entry: RewardEntry, source: ModelSource) -> RewardStats | None:
    return RewardStats.read(Path(source.adapter or source.base)) if entry.normalize else None


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


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
