"""The list of stages. Everything else about a stage is in its own folder, in the STAGE record of its config.py."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from conversations.sections import StageRecipe, TrainingRecipe
from conversations.stage import Stage, Training

FOLDERS = ("sft", "reward", "rl", "eval", "pairs")


def stages() -> dict[str, Stage]:
    """All stages by name."""
    records: list[Stage] = [import_module(f"{folder}.config").STAGE for folder in FOLDERS]
    return {stage.name: stage for stage in records}


def trainings() -> list[Training]:
    """How stages train, each with each of its methods."""
    ways = [way for stage in stages().values() for way in (stage, *stage.methods.values())]
    return [way.training for way in ways if way.training]


def stage_written(tree: Mapping[str, Any]) -> Stage | None:
    """The stage that a recipe names, as its method makes it; None for an unknown one. The recipe need not be valid."""
    stage = stages().get(str(tree.get("stage")))
    return stage and stage.methods.get(str(tree.get("method")), stage)


def stage_of(recipe: StageRecipe) -> Stage:
    """The stage of a recipe."""
    stage = stage_written({"stage": recipe.stage, "method": getattr(recipe, "method", None)})
    assert stage is not None, recipe.stage
    return stage


def training_of(recipe: TrainingRecipe) -> Training:
    """The `Training` record of the recipe's stage."""
    training = stage_of(recipe).training
    assert training is not None, recipe.stage
    return training
