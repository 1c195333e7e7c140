"""The recipes that come with the toolkit, by name: `v2_lite/sft_lora` is recipes/v2_lite/sft_lora.yaml. No torch.

Names are for an installed toolkit, whose sources are not in the working directory. A file in the working directory
takes precedence.
"""

import re
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Any

from conversations.errors import ToolkitError
from recipes.files import write_text

_HOME = Path(__file__).resolve().parents[1]
_STAGE_RECIPE = re.compile(r"(\brecipe: )([\w-]+)\.yaml\b")


def shipped_recipes() -> dict[str, Path]:
    """All shipped recipes: {name: file}."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(_HOME.glob("*/*.yaml"))}


def recipe_name(path: str | PurePath) -> str | None:
    """The name of the shipped recipe that a path refers to; None if the path exists, or there is no such recipe."""
    name = PurePath(path).as_posix().removeprefix("recipes/").removesuffix(".yaml")
    return name if not Path(path).exists() and name in shipped_recipes() else None


def find_recipe(path: Path) -> Path:
    """Resolve a path, or the name of a shipped recipe, to a file.

    Raises:
        ToolkitError: neither exists.
    """
    if path.exists():
        return path
    shipped = shipped_recipes()
    if (name := recipe_name(path)) is not None:
        return shipped[name]
    near = get_close_matches(path.as_posix().removeprefix("recipes/").removesuffix(".yaml"), shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else "`dsv2 recipes` lists those that come with the toolkit"
    raise ToolkitError(f"no such recipe: {path}; {hint}")


def by_name(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Refer to the stage recipes of a shipped chain by name; they are in the same folder."""
    stages, folder = tree.get("stages"), PurePath(name).parent
    if not isinstance(stages, list):
        return tree
    return {**tree, "stages": [{**stage, "recipe": str(folder / PurePath(stage["recipe"]).stem)} for stage in stages]}


def headline(path: Path) -> str:
    """The first sentence of a recipe's opening comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first_paragraph = takewhile(lambda line: line.startswith("#") and line.strip() != "#", lines)
    return " ".join(line.removeprefix("#").strip() for line in first_paragraph).split(". ")[0].rstrip(".")


def copy_recipe(name: str, target: Path) -> None:
    """Copy a shipped recipe to a file for editing. A chain still refers to the shipped stage recipes, by name.

    Raises:
        ToolkitError: there is no such recipe, or `target` already exists.
    """
    source = shipped_recipes().get(recipe_name(name) or "") or find_recipe(Path(name))
    if target.exists():
        raise ToolkitError(f"{target} exists already; choose another file")
    folder, text = source.parent.name, source.read_text(encoding="utf-8")
    text = _STAGE_RECIPE.sub(rf"\g<1>{folder}/\g<2>", text)
    text = text.replace(f"recipes/{folder}/{source.name}", str(target))
    write_text(target, text)
