"""Loads a recipe file, applies `--smoke` and then the overrides, and validates the result. No torch."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from conversations.errors import ToolkitError
from conversations.sections import StageRecipe
from recipes.recipe.overrides import Override, apply_override, parse_override
from recipes.recipe.paths import absolute_paths
from recipes.recipe.schema import CHAIN, ChainRecipe, Recipe, dump, validate
from recipes.recipe.shipped import by_name, find_recipe, recipe_name
from recipes.recipe.smoke import shrink, shrink_chain
from recipes.recipe.yaml_text import read_mapping
from recipes.secret_keys import refuse_secrets

R = TypeVar("R", bound=Recipe, covariant=True)


@dataclass(frozen=True)
class Loaded(Generic[R]):
    """A validated recipe and its file. `notes` list what `--smoke` replaced; `use_cache`: whether prepared rows are
    cached."""

    recipe: R
    path: Path
    smoke: bool = False
    notes: list[str] = field(default_factory=list)
    use_cache: bool = True

    @property
    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as written to recipe.yaml."""
        return dump(self.recipe)


def read_tree(path: Path) -> dict[str, Any]:
    """Read a recipe file, or a shipped recipe by name, as a mapping with relative file names made absolute.

    Raises:
        ToolkitError: as `read_mapping`, or the recipe holds secrets.
    """
    file, name = find_recipe(path), recipe_name(path)
    tree = read_mapping(file)
    refuse_secrets(tree)
    if name is None:
        return absolute_paths(tree, file.absolute().parent)
    return absolute_paths(by_name(tree, name), Path.cwd())  # data files are the user's, not the toolkit's


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, smoke: bool = False, use_cache: bool = True
) -> Loaded[Recipe]:
    """Read, shrink, override and validate a recipe of any stage or a chain.

    Args:
        path: the YAML file.
        overrides: `key.path=value` texts.
        smoke: shrink to toy size before the overrides.
        use_cache: whether prepared rows are cached.

    Raises:
        ToolkitError: the file, an override, a key or a value is wrong.
    """
    parsed = [parse_override(text) for text in overrides]
    tree = read_tree(path)
    notes: list[str] = []
    if smoke:
        tree, notes = shrink_chain(tree, read_tree) if tree.get("stage") == CHAIN else shrink(tree)
    tree = copy.deepcopy(tree)
    for override in parsed:
        value = absolute_paths(override.value, Path.cwd(), override.keys)
        apply_override(tree, Override(override.keys, value))
    refuse_secrets(tree)
    return Loaded(validate(tree), path, smoke, notes, use_cache)


def of_stage(loaded: Loaded[Recipe], names: Collection[str]) -> Loaded[StageRecipe]:
    """Narrow to a recipe of one of these stages. Raises ToolkitError for any other, naming the right command."""
    recipe = loaded.recipe
    if isinstance(recipe, StageRecipe) and recipe.stage in names:
        return Loaded(recipe, loaded.path, loaded.smoke, loaded.notes, loaded.use_cache)
    raise _wrong_stage(loaded, " or ".join(names))


def of_chain(loaded: Loaded[Recipe]) -> Loaded[ChainRecipe]:
    """Narrow to a chain recipe. Raises as `of_stage`."""
    recipe = loaded.recipe
    if isinstance(recipe, ChainRecipe):
        return Loaded(recipe, loaded.path, loaded.smoke, loaded.notes, loaded.use_cache)
    raise _wrong_stage(loaded, CHAIN)


def _wrong_stage(loaded: Loaded[Recipe], expected: str) -> ToolkitError:
    stage = loaded.recipe.stage
    command = "run" if stage == CHAIN else stage
    return ToolkitError(
        f"{loaded.path} is a recipe of stage {stage}, not {expected}; run: dsv2 {command} {loaded.path}"
    )
