"""A recipe file, `--smoke` and overrides, in this order, to a checked recipe. No torch."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from recipes.recipe.overrides import Override, apply_override, parse_override
from recipes.recipe.paths import absolute_paths
from recipes.recipe.schema import dump, validate
from recipes.recipe.secret_keys import refuse_secrets
from recipes.recipe.shipped import by_name, find_recipe, recipe_name
from recipes.recipe.smoke import shrink, shrink_chain
from recipes.recipe.yaml_text import read_mapping

COMMANDS = {"sft": "sft", "reward": "reward", "rl": "rl", "eval": "eval", "chain": "run"}


@dataclass(frozen=True)
class Loaded:
    """A checked recipe with where it came from. `notes` say what `--smoke` replaced."""

    recipe: Any
    path: Path
    smoke: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as recipe.yaml holds it."""
        return dump(self.recipe)


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping of a recipe file, or of a shipped recipe by its name, with its relative files made absolute.

    Raises:
        ToolkitError: as `read_mapping`, and for secrets in it.
    """
    file, name = find_recipe(path), recipe_name(path)
    tree = read_mapping(file)
    refuse_secrets(tree)
    if name is None:
        return absolute_paths(tree, file.absolute().parent)
    return absolute_paths(by_name(tree, name), Path.cwd())  # data files are the user's, not the toolkit's


def override_tree(tree: dict[str, Any], overrides: Sequence[Override], cwd: Path) -> dict[str, Any]:
    """`tree` with overrides, their relative files made absolute from `cwd`."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        value = absolute_paths(override.value, cwd, override.keys)
        apply_override(tree, Override(override.keys, value))
    return tree


def load_recipe(path: Path, overrides: Sequence[str] = (), *, smoke: bool = False, stage: str | None = None) -> Loaded:
    """Read, shrink, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key.path=value` texts.
        smoke: shrink to toy size before the overrides.
        stage: the stage the recipe must be of; None takes any.

    Raises:
        ToolkitError: the file, an override, a key or a value is wrong.
    """
    parsed = [parse_override(text) for text in overrides]
    tree = read_tree(path)
    notes: list[str] = []
    if smoke:
        tree, notes = shrink_chain(tree, read_tree) if tree.get("stage") == "chain" else shrink(tree)
    tree = override_tree(tree, parsed, Path.cwd())
    refuse_secrets(tree)
    recipe = validate(tree)
    if stage is not None and recipe.stage != stage:
        raise ToolkitError(
            f"{path} is a recipe of stage {recipe.stage}, not {stage}; run: dsv2 {COMMANDS[recipe.stage]} {path}"
        )
    return Loaded(recipe, path, smoke, notes)
