"""What can be known about a recipe's models without reading weights: files, config, tokenizer. Imports torch.

`dsv2 check` and runs start here, so that anything that loading would refuse is refused before anything is loaded.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations.answers.reward_stats import RewardStats
from conversations.errors import ToolkitError
from conversations.rendering.own_template import OwnTemplate
from conversations.rendering.template import TEMPLATES, has_other_template, install_template, usable_template
from conversations.sections import LoraSection, ModelSection, ModelUse, StageRecipe, TrainingRecipe
from deepseek_v2_modeling import PRESETS, DeepseekV2Config, preset_config
from deepseek_v2_modeling.adapters import check_new_targets, match_adapter
from deepseek_v2_modeling.esft import ExpertChoice, read_choice
from deepseek_v2_modeling.loading import (
    TASKS,
    Head,
    LoraSettings,
    ModelSource,
    apply_settings,
    check_bias_updates,
    check_generation,
    check_quantization_library,
    check_vocabulary,
    check_weights,
    load_tokenizer,
    meta_model,
    resolve_source,
)
from deepseek_v2_modeling.training import Parallel
from recipes.processes import say
from recipes.runs.devices import check_device
from recipes.runs.preset_tokenizer import build_tokenizer
from recipes.stages import stages, training_of


@dataclass(frozen=True)
class Foundation:
    """A model whose weights have not been read yet.

    source: its files; None if they are yet to be created by a preset or an earlier stage, or downloaded from a hub.
    settings, tokenizer: None for a hub model that was not looked up. kind: the head of its weights; None for an
    evaluation, which produces no model.
    """

    source: ModelSource | None = None
    settings: DeepseekV2Config | None = None
    tokenizer: Any = None
    kind: Head | None = "causal_lm"


# What stages that have not run yet will produce, by run directory.
Earlier = Mapping[str, Foundation]


def find_model(section: ModelSection, earlier: Earlier, ask_hub: bool) -> Foundation:
    """Find a model's config and tokenizer (with our template): from files, an earlier stage, or a preset.

    Raises:
        ToolkitError, ModelError: the model does not exist, or its files cannot be read.
    """
    if foundation := coming(section.path, earlier):
        return foundation
    if not Path(section.path).exists() and section.preset is not None:
        if section.preset not in PRESETS:
            raise ToolkitError(f'model.preset: unknown preset "{section.preset}": use one of {", ".join(PRESETS)}')
        settings = preset_config(section.preset)
        foundation = Foundation(None, settings, build_tokenizer(section.preset, settings.model_type))
    else:
        foundation = read_foundation(resolve_source(section.path), ask_hub)
    tokenizer, settings = foundation.tokenizer, foundation.settings
    if tokenizer and settings and (note := choose_template(tokenizer, settings.model_type)):
        say(f"{section.path}: {note}")
    return foundation


def choose_template(tokenizer: Any, model_type: str) -> str | None:
    """Give the tokenizer the template that rows are rendered with. Returns what the user should know of it; None if it
    is the usual one of the model's family, or one of another family that the tokenizer had."""
    is_other, had = has_other_template(tokenizer), usable_template(tokenizer)
    text, end = tokenizer.chat_template, tokenizer.eos_token
    template = install_template(tokenizer, model_type)
    usual = TEMPLATES.get(model_type, template)
    if isinstance(template, OwnTemplate):
        thinking = ", without thoughts unless enable_thinking is true" * (template.text != text)
        ending = f"; answers end with {template.end}, now the tokenizer's end token" * (template.end != end)
        return f"rows are rendered with its own chat template{thinking}{ending}"
    if is_other:
        why = "its own chat template is not used, since its prompts do not begin what it writes for conversations"
    elif had is None and template is not usual:
        why = f"it lacks the tokens of {usual.name}'s template"
    else:
        return None
    return f"{why}; rows are rendered, and results saved, with {template.name}'s"


def coming(path: str, earlier: Earlier) -> Foundation | None:
    """What the stage whose run directory contains `path` will produce; None for any other path."""
    return next((foundation for run_dir, foundation in earlier.items() if Path(path).is_relative_to(run_dir)), None)


def read_foundation(source: ModelSource, ask_hub: bool) -> Foundation:
    """Read the config and tokenizer; both are None for a hub model that is not to be looked up."""
    if not (ask_hub or Path(source.base).exists()):
        return Foundation()
    check_generation(source.base, source.settings.vocab_size)
    return Foundation(source, source.settings, load_tokenizer(source), kind_of(source))


def check_model(recipe: StageRecipe, foundation: Foundation) -> DeepseekV2Config | None:
    """Check the model against the recipe; returns its settings as the stage uses them, None if they are not known.

    Raises:
        ToolkitError, ModelError: loading it, or adding the recipe's adapters, would be refused.
    """
    trained = isinstance(recipe, TrainingRecipe)
    experts = expert_choice(recipe) if trained else None
    head = head_of(recipe)
    if foundation.settings is not None or foundation.kind is None:
        check_kind(recipe.model.path, foundation.kind, head, new_head=trained)
        if recipe.reads_lm_head:
            check_kind(recipe.model.path, foundation.kind, "causal_lm")
    if recipe.model.quantization is not None:
        check_quantization_library(recipe.model.quantization)
    if foundation.settings is None:
        return None
    settings = apply_settings(copy.deepcopy(foundation.settings), head, recipe.model.config, recipe.score_heads)
    if experts is not None:
        experts.check(settings)
    if trained and recipe.lora is not None:
        check_bias_updates(settings, _why_no_bias_moves(recipe))
    if trained and recipe.set_for_experts and not settings.has_routed_experts:
        raise ToolkitError(
            f"{recipe.set_for_experts[0]} is for routed experts, and {recipe.model.path} has none: leave it out"
        )
    if trained and recipe.parallel is not None:
        Parallel(recipe.parallel.fsdp, recipe.parallel.ep).check_experts(settings.n_routed_experts)
    outline = meta_model(settings, head, recipe.model.quantization)
    if trained and recipe.lora is not None:
        check_new_targets(outline, lora_settings(recipe.lora).config(TASKS[head]))
    check_files(foundation, settings, head, recipe.model.path)
    return settings


def _why_no_bias_moves(recipe: TrainingRecipe) -> str | None:
    """Why the biases of routers cannot be updated beside adapters."""
    if recipe.compares_with_base:
        return "with LoRA its reference is the same base, whose routing must stay as it is"
    if recipe.parallel is not None:
        return "with LoRA and parallel, checkpoints hold factors of adapters only"
    return None


def check_files(foundation: Foundation, settings: DeepseekV2Config, head: Head, path: str) -> None:
    """Check tokenizer, weights and adapter against the settings they are loaded with, reading only file headers.

    Raises:
        ModelError: token ids without an embedding, missing or unexpected tensors, or broken files.
    """
    source = foundation.source
    check_vocabulary(foundation.tokenizer, settings, source.tokenizer_dir if source else path)
    if source is None or not Path(source.base).is_dir():
        return
    check_weights(source.base, copy.deepcopy(settings), head)
    if source.adapter:
        match_adapter(source.adapter, copy.deepcopy(settings))


def check_other_models(recipe: StageRecipe, earlier: Earlier, ask_hub: bool) -> None:
    """Check the models that the stage uses besides its own.

    Raises:
        ToolkitError, ModelError: a model does not exist, has another head, or cannot be loaded, or its device does not
            exist.
    """
    for use in recipe.other_models():
        if use.device is not None:
            check_device(f"{use.key.rpartition('.')[0]}.device", use.device)
        if foundation := coming(use.path, earlier):
            check_kind(use.path, foundation.kind, use.head)
            continue
        try:
            source = source_of(use)
        except ValueError as error:  # ToolkitError and ModelError
            raise type(error)(f"{use.key}: {error}") from None
        foundation = read_foundation(source, ask_hub) if source else None
        if source and foundation and foundation.settings is not None:
            check_files(
                foundation, apply_settings(copy.deepcopy(foundation.settings), use.head, None), use.head, use.path
            )
            stats_of(use, source)


def source_of(use: ModelUse) -> ModelSource | None:
    """The files of a model used besides the stage's own; None if a random one replaces it.

    Raises:
        ToolkitError, ModelError: it is missing, or has another head.
    """
    if not Path(use.path).exists():
        if use.stand_in:
            return None
        raise ToolkitError(f"{use.path} does not exist; {use.remedy}")
    source = resolve_source(use.path)
    check_kind(use.path, kind_of(source), use.head)
    return source


def stats_of(use: ModelUse, source: ModelSource) -> RewardStats | None:
    """The statistics of the model's scores, if the recipe asks for them."""
    return RewardStats.read(source.own_dir) if use.stats else None


def check_kind(path: str, kind: Head | None, needed: Head, new_head: bool = False) -> None:
    """Refuse a chat model used as a reward model, which would give random scores, and vice versa.

    new_head: whether a chat model may get a new score head.

    Raises:
        ToolkitError: the path is a model of the other kind.
    """
    if kind is None:
        raise ToolkitError(f"{path} will not contain a model; name a stage that trains one")
    if kind == "score" and needed == "causal_lm":
        raise ToolkitError(f"{path} is a reward model, which scores answers and cannot write them; name a chat model")
    if kind == "causal_lm" and needed == "score" and not new_head:
        makes = next(stage.name for stage in stages().values() if stage.training and stage.training.head == needed)
        raise ToolkitError(f"{path} is a chat model, not a reward model; train one with: dsv2 {makes} RECIPE")


def kind_of(source: ModelSource) -> Head:
    """The head that the files contain. A hub model that is not on this machine counts as a chat model."""
    if source.adapter:
        return source.adapter.head
    kinds = (source.settings.architectures if Path(source.base).is_dir() else None) or []
    return "score" if any("SequenceClassification" in kind for kind in kinds) else "causal_lm"


def head_of(recipe: StageRecipe) -> Head:
    """The head that a stage needs."""
    return training_of(recipe).head if isinstance(recipe, TrainingRecipe) else recipe.head


def lora_settings(section: LoraSection) -> LoraSettings:
    """Convert a `lora` section to the model package's settings."""
    values: dict[str, Any] = section.model_dump(include={"r", "alpha", "dropout", "rslora"})
    return LoraSettings(tuple(section.targets), **values)


def expert_choice(recipe: TrainingRecipe) -> ExpertChoice | None:
    """The routed experts that the recipe trains; None for all. Raises ModelError for an unusable experts file."""
    return read_choice(recipe.chosen_experts_file) if recipe.chosen_experts_file else None
