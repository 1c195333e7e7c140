"""The list of stages. Everything else about a stage is in its own folder, in the STAGE record of its config.py."""

from importlib import import_module

from conversations.sections import StageRecipe, TrainingRecipe
from conversations.stage import Stage, Training

FOLDERS = ("sft", "reward", "rl", "eval", "pairs")


def stages() -> dict[str, Stage]:
    """All stages by name."""
    records: list[Stage] = [import_module(f"{folder}.config").STAGE for folder in FOLDERS]
    return {stage.name: stage for stage in records}


def stage_of(recipe: StageRecipe) -> Stage:
    """The stage of a recipe."""
    return stages()[recipe.stage]


def training_of(recipe: TrainingRecipe) -> Training:
    """The `Training` record of the recipe's stage."""
    training = stage_of(recipe).training
    assert training is not None, recipe.stage
    return training
