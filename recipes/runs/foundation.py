"""What is known of a recipe's models before a weight is read: files, config, tokenizer. Imports torch.

`dsv2 check` and a run look here first, so that whatever loading would refuse is refused before anything is loaded.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.rendering.template import has_other_template, install_template
from conversations.sections import LoraSection, ModelSection, TrainingRecipe
from deepseek_v2_modeling import PRESETS, DeepseekV2Config
from deepseek_v2_modeling.adapters import check_targets, match_adapter
from deepseek_v2_modeling.esft import ExpertChoice, read_choice
from deepseek_v2_modeling.loading import (
    TASKS,
    Head,
    LoraSettings,
    ModelSource,
    apply_settings,
    check_generation,
    check_vocabulary,
    check_weights,
    load_tokenizer,
    meta_model,
    resolve_source,
)
from recipes.processes import say
from recipes.tiny.tokenizer import build_tokenizer
from reward.config import RewardRecipe
from rl.config import RewardEntry, RlRecipe
from rl.rewards import RewardStats, RuleReward


@dataclass(frozen=True)
class Foundation:
    """A model whose weights are not read yet.

    source: its files; None where a preset or an earlier stage is still to make them, or a hub to send them.
    settings, tokenizer: None for a model on a hub that was not asked. kind: the head that its weights have; None for
    an evaluation, which makes no model.
    """

    source: ModelSource | None = None
    settings: DeepseekV2Config | None = None
    tokenizer: Any = None
    kind: Head | None = "causal_lm"


# What stages that have not been run yet will give, by their run directories.
Earlier = Mapping[str, Foundation]


def find_model(section: ModelSection, earlier: Earlier, ask_hub: bool) -> Foundation:
    """The config and the tokenizer, with our template, of files, of an earlier stage, or of a preset.

    Raises:
        ToolkitError, ModelError: no such model, or files of it that cannot be read.
    """
    if found := coming(section.path, earlier):
        return found
    if not Path(section.path).exists() and section.preset is not None:
        if section.preset not in PRESETS:
            raise ToolkitError(f'model.preset: unknown preset "{section.preset}": use one of {", ".join(PRESETS)}')
        found = Foundation(None, DeepseekV2Config(**PRESETS[section.preset]), build_tokenizer(section.preset))
    else:
        found = read_foundation(resolve_source(section.path), ask_hub)
    if found.tokenizer is not None:
        tell_template(section.path, found.tokenizer)
        install_template(found.tokenizer)
    return found


def coming(path: str, earlier: Earlier) -> Foundation | None:
    """What the stage will give in whose run directory the path lies; None for any other path."""
    return next((found for run_dir, found in earlier.items() if Path(path).is_relative_to(run_dir)), None)


def tell_template(path: str, tokenizer: Any) -> None:
    """Say where a model's own chat template will not be used."""
    if has_other_template(tokenizer):
        say(f"{path}: its own chat template is not used; rows are rendered, and results saved, with DeepSeek-V2's")


def read_foundation(source: ModelSource, ask_hub: bool) -> Foundation:
    """What the files say; nothing where they are on a hub that is not to be asked."""
    if not (ask_hub or Path(source.base).exists()):
        return Foundation()
    check_generation(source.base, source.settings.vocab_size)
    return Foundation(source, source.settings, load_tokenizer(source), kind_of(source))


def check_model(recipe: Any, found: Foundation) -> DeepseekV2Config | None:
    """Hold the model against the recipe; returns its settings as the stage has them, None where they are not known.

    Raises:
        ToolkitError, ModelError: whatever loading it, or putting the recipe's adapters on it, would refuse.
    """
    experts = None if recipe.stage == "eval" else expert_choice(recipe)
    head = head_of(recipe)
    if found.settings is not None or found.kind is None:
        check_kind(recipe.model.path, found.kind, head, new_head=recipe.stage == "reward")
    if found.settings is None:
        return None
    check_files(found, head, recipe.model.path)
    settings = apply_settings(copy.deepcopy(found.settings), head, recipe.model.config)
    if experts is not None:
        experts.check(settings)
    if recipe.stage != "eval" and recipe.lora is not None:
        check_targets(meta_model(settings, head), lora_settings(recipe.lora).config(TASKS[head]))
    return settings


def check_files(found: Foundation, head: Head, path: str) -> None:
    """Match tokenizer, weights and adapter to the config, by the headers of the files.

    Raises:
        ModelError: ids without an embedding, or tensors without a place, places without a tensor, broken files.
    """
    assert found.settings is not None
    source = found.source
    check_vocabulary(found.tokenizer, found.settings, source.tokenizer_dir if source else path)
    if source is None or not Path(source.base).is_dir():
        return
    check_weights(source.base, apply_settings(copy.deepcopy(found.settings), head, None), head)
    if source.adapter:
        match_adapter(source.adapter, found.settings)


def check_rewards(recipe: RlRecipe, earlier: Earlier, ask_hub: bool) -> None:
    """Look at the reward models and rules.

    Raises:
        ToolkitError, ModelError: no such rule, no such model, or one that is no reward model or cannot be loaded.
    """
    for index, entry in enumerate(recipe.rewards):
        if entry.rule is not None:
            RuleReward(entry.rule)
            continue
        assert entry.model is not None
        if found := coming(entry.model, earlier):
            check_kind(entry.model, found.kind, "score")
            continue
        try:
            source = reward_source(entry)
        except ValueError as error:  # ToolkitError and ModelError
            raise type(error)(f"rewards.{index}.model: {error}") from None
        found = read_foundation(source, ask_hub) if source else None
        if source and found and found.settings is not None:
            check_files(found, "score", entry.model)
            reward_stats(entry, source)


def reward_source(entry: RewardEntry) -> ModelSource | None:
    """The files of a reward model; None where a random one stands in for it.

    Raises:
        ToolkitError, ModelError: it is missing, or no reward model.
    """
    path = entry.model or ""
    if not Path(path).exists():
        if entry.if_missing == "random":
            return None
        raise ToolkitError(f"{path} is not there; train it with: dsv2 reward RECIPE, or set if_missing: random")
    source = resolve_source(path)
    check_kind(path, kind_of(source), "score")
    return source


def reward_stats(entry: RewardEntry, source: ModelSource) -> RewardStats | None:
    """The statistics of a reward model's scores, where the recipe wants them normalised."""
    return RewardStats.read(source.own_dir) if entry.normalize else None


def check_kind(path: str, kind: Head | None, wanted: Head, new_head: bool = False) -> None:
    """Refuse a chat model as a reward model, which would score at random, and the other way round.

    new_head: whether a chat model may get a new score head.

    Raises:
        ToolkitError: the path is a model of the other kind.
    """
    if kind is None:
        raise ToolkitError(f"{path} will be an evaluation; name a stage that makes a model")
    if kind == "score" and wanted == "causal_lm":
        raise ToolkitError(f"{path} is a reward model: it scores answers and writes none; name a chat model")
    if kind == "causal_lm" and wanted == "score" and not new_head:
        raise ToolkitError(f"{path} is a chat model, not a reward model; train one with: dsv2 reward RECIPE")


def kind_of(source: ModelSource) -> Head:
    """The head that the files hold. A hub name that is not on this machine counts as a chat model."""
    if source.adapter:
        return source.adapter.head
    kinds = (source.settings.architectures if Path(source.base).is_dir() else None) or []
    return "score" if any("SequenceClassification" in kind for kind in kinds) else "causal_lm"


def head_of(recipe: Any) -> Head:
    """The head that a stage needs."""
    if recipe.stage == "eval":
        return recipe.head
    return "score" if isinstance(recipe, RewardRecipe) else "causal_lm"


def lora_settings(section: LoraSection) -> LoraSettings:
    """The model floor's form of a `lora` section."""
    values: dict[str, Any] = section.model_dump(include={"r", "alpha", "dropout", "rslora"})
    return LoraSettings(tuple(section.targets), **values)


def expert_choice(recipe: TrainingRecipe) -> ExpertChoice | None:
    """The routed experts that the recipe wants to train; None for all. Raises ModelError for a file of no use."""
    file = recipe.lora.experts_file if recipe.lora else recipe.experts_file
    return read_choice(file) if file else None
