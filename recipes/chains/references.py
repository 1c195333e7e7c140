"""`${name}` references in a chain: the model, an earlier stage's run directory, or its number of trained tokens."""

import re
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.sections import StageRecipe
from recipes.recipe.schema import ChainRecipe

_REFERENCE = re.compile(r"\$\{([^}]*)\}")


class References:
    """The values that `${...}` can refer to so far; grows as stages finish."""

    def __init__(self, chain: ChainRecipe):
        self._all = [entry.name for entry in chain.stages]
        self._run_dirs: dict[str, str] = {}
        self._values: dict[str, Any] = {"output_dir": chain.output_dir, "seed": chain.seed}
        if chain.model.path is not None:
            self._values["model"] = self.fill(chain.model.path, "model.path: ")

    def add(self, name: str, run_dir: str, tokens: int | None) -> None:
        """Add a stage that later ones may refer to. tokens: how many it trained on; None if it trains nothing."""
        self._run_dirs[name] = run_dir
        self._values |= {name: run_dir} | ({} if tokens is None else {f"{name}.tokens": tokens})

    def fill(self, value: Any, where: str) -> Any:
        """Replace every `${name}` in `value`. A reference that is the whole string keeps its type (`${sft.tokens}`).

        Raises:
            ToolkitError: an unknown name, or a stage that comes later.
        """
        if isinstance(value, dict):
            return {key: self.fill(item, f"{where}{key}.") for key, item in value.items()}
        if isinstance(value, list):
            return [self.fill(item, f"{where}{i}.") for i, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        reference = _REFERENCE.fullmatch(value)
        if reference:
            return self._value(reference[1], where)
        return _REFERENCE.sub(lambda match: str(self._value(match[1], where)), value)

    def used(self, recipe: StageRecipe) -> dict[str, str]:
        """The stages that a resolved recipe refers to: {name: run directory}."""
        texts = list(_texts(recipe.model_dump(mode="json", exclude={"output_dir"})))
        return {
            name: run_dir
            for name, run_dir in self._run_dirs.items()
            if any(Path(text).is_relative_to(run_dir) for text in texts)
        }

    def _value(self, name: str, where: str) -> Any:
        if name in self._values:
            return self._values[name]
        key = where.rstrip(".: ")
        if name.removesuffix(".tokens") in self._run_dirs:
            raise ToolkitError(f"{key}: ${{{name}}}: that stage trains nothing, so it has no tokens")
        if name.split(".")[0] in self._all:
            raise ToolkitError(f"{key}: ${{{name}}} names a stage that does not run before this one")
        available = ", ".join(f"${{{value}}}" for value in self._values)
        raise ToolkitError(f"{key}: ${{{name}}} is not defined here; available are {available}")


def _texts(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
