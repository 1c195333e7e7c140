"""What a training recipe puts on its GPUs: its model's sizes, one training step, and what it holds besides."""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from conversations.sections import TrainingRecipe
from deepseek_v2_modeling import DeepseekV2Config, released_config
from deepseek_v2_modeling.loading import apply_settings
from deepseek_v2_modeling.training import Step, training_sizes
from recipes.plan.memory import Load, Rollouts
from recipes.runs.foundation import Foundation, expert_choice, head_of, lora_settings, source_of
from recipes.runs.training_fields import setting

PROMPT = 512  # tokens; assumed of prompts that were not read
# Bytes of state for a trained value, by how the optimizer's name begins; any other is taken to have Adam's two moments.
MOMENTS = {"sgd": 0.0, "adafactor": 0.1, "lion": 4.0, "rmsprop": 4.0, "adagrad": 4.0}
MOMENTS_8BIT = 2.0
MOMENTS_OF_ADAM = 8.0


@dataclass(frozen=True)
class Lengths:
    """Tokens of a recipe's rows. longest: the most that its stage encodes of a row (a prompt, a conversation); None if
    the rows were not read."""

    longest: int | None = None

    def of_row(self, recipe: TrainingRecipe) -> int:
        """The longest sequence in training."""
        if answer := answer_length(recipe):
            return (self.longest or PROMPT) + answer
        limit = setting(recipe, "max_length")
        if setting(recipe, "packing"):
            return limit
        return min(filter(None, (self.longest, limit)), default=PROMPT)


def answer_length(recipe: TrainingRecipe) -> int | None:
    """The longest answer that the recipe samples, None if it samples none."""
    samples = any(listed.answer for listed in recipe.row_lists())
    return setting(recipe, "max_completion_length") if samples else None


def known_settings(recipe: TrainingRecipe, foundation: Foundation) -> DeepseekV2Config | None:
    """The settings that the recipe's model is trained with; for a hub model those of the release of that name."""
    settings = foundation.settings or released_config(recipe.model.path)
    if settings is None:
        return None
    return apply_settings(copy.deepcopy(settings), head_of(recipe), recipe.model.config, recipe.score_heads)


def load_of(
    recipe: TrainingRecipe, settings: DeepseekV2Config, lengths: Lengths, foundation: Foundation, on_cpu: bool = False
) -> Load:
    """What the recipe puts on its GPUs. on_cpu: or on a CPU, where softmaxes are computed in smaller pieces."""
    lora = lora_settings(recipe.lora) if recipe.lora else None
    experts = expert_choice(recipe)
    full = lora is None and experts is None
    sizes = training_sizes(
        settings,
        head_of(recipe),
        lora,
        dtype=recipe.model.dtype,
        experts=experts,
        router=recipe.trains_router,
        quantization=recipe.model.quantization,
    )
    low = getattr(torch, recipe.model.dtype).itemsize
    load = Load(settings, sizes, _step(recipe, lengths, low, 4 if full else low, on_cpu), _moments(recipe), full)
    reference, held = _reference(recipe, load, foundation), _other_models(recipe, load, foundation)
    return replace(load, reference=reference, held=held, rollouts=_rollouts(recipe, settings, lengths, low))


def sequences_per_batch(recipe: TrainingRecipe) -> int:
    """Sequences in a micro-batch of one process."""
    return setting(recipe, "per_device_train_batch_size") * recipe.sequences_per_row


def _step(recipe: TrainingRecipe, lengths: Lengths, low: int, wide: int, on_cpu: bool) -> Step:
    sequences, answer = sequences_per_batch(recipe), answer_length(recipe)
    length = lengths.of_row(recipe)
    tokens = sequences * length
    if answer:  # the answers of a group stand beside each other, and their prompt is read once
        prompts = math.ceil(sequences / setting(recipe, "num_generations"))
        tokens = prompts * (length - answer) + sequences * (answer + 1)
    scores_text = head_of(recipe) == "causal_lm" or recipe.reads_lm_head
    asked = (recipe.training.get(f"{word}_checkpointing") for word in ("gradient", "activation"))
    return Step(
        tokens=tokens,
        labels=(sequences * answer if answer else tokens) * scores_text,
        low=low,
        wide=wide,
        checkpointing=any(asked),
        on_cpu=on_cpu,
        figures=not recipe.reads_lm_head,
        accumulates=setting(recipe, "gradient_accumulation_steps") > 1,
        uniform=not answer,
        keys=sequences * length,
    )


def _moments(recipe: TrainingRecipe) -> float:
    name = getattr(setting(recipe, "optim"), "value", setting(recipe, "optim"))
    if "8bit" in name:
        return MOMENTS_8BIT
    return next((size for start, size in MOMENTS.items() if name.startswith(start)), MOMENTS_OF_ADAM)


def _reference(recipe: TrainingRecipe, load: Load, foundation: Foundation) -> dict[str, int]:
    """The frozen copy that KL is measured against: of all weights, or of the adapters whose training continues."""
    if not answer_length(recipe) or not setting(recipe, "beta"):
        return {}
    if recipe.lora is None:
        return {"reference model": load.sizes.total(lambda w: w.values * w.itemsize)}
    goes_on = foundation.source is not None and foundation.source.adapter is not None
    return {"reference adapters": load.sizes.total(lambda w: w.values * w.itemsize * w.adapter)} if goes_on else {}


def _other_models(recipe: TrainingRecipe, load: Load, foundation: Foundation) -> dict[str, int]:
    """Models that score answers: adapters on this stage's base, or weights of their own. One that is not there yet is
    taken to be as large as this stage's."""
    base = load.sizes.total(lambda w: w.values * min(w.itemsize, load.step.low) * (not w.adapter))
    quantization = recipe.model.quantization
    held = {}
    if recipe.reads_lm_head:
        held["language-model head"] = load.settings.vocab_size * load.settings.hidden_size * load.step.low
    for use in recipe.other_models():
        source = source_of(use) if Path(use.path).exists() else None
        shared = bool(recipe.lora and source and source.adapter and foundation.source)
        if shared and source and foundation.source and source.base == foundation.source.base:
            assert source.adapter is not None
            held[use.key] = sum(4 * _values(info.shape) for info in source.adapter.header.values())
        elif source is not None:
            sizes = training_sizes(source.settings, use.head, quantization=quantization)
            held[use.key] = sizes.total(lambda w: w.values * min(w.itemsize, load.step.low))
        else:
            held[use.key] = base
    return held


def _values(shape: Any) -> int:
    return int(torch.Size(shape).numel())


def _rollouts(recipe: TrainingRecipe, settings: DeepseekV2Config, lengths: Lengths, low: int) -> Rollouts | None:
    answer = answer_length(recipe)
    if not answer:
        return None
    width = sum(settings.attention_sizes.cached)
    rounds = setting(recipe, "steps_per_generation") or setting(recipe, "gradient_accumulation_steps")
    answers = setting(recipe, "per_device_train_batch_size") * rounds
    asked: Any = getattr(recipe, "rollout")  # noqa: B009 - of recipes that sample answers
    cache = settings.num_hidden_layers * lengths.of_row(recipe) * width * low
    return Rollouts(asked, answers, cache, recipe.lora is not None)
