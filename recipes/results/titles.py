"""Titles from a chain's recipe for its stages, results and comparisons, for tables and pages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Titles:
    """`stages`: stage name -> title of its run, in chain order; `places`: place in results.json, such as stages.sft ->
    title of the model evaluated there; `comparisons`: by name; `tasks`: of evaluations, in column order."""

    stages: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    comparisons: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)

    def section(self, name: str) -> dict[str, str]:
        """The titles of a section of results.json, `stages` or `reward_models`."""
        return {place[len(name) + 1 :]: title for place, title in self.places.items() if place.startswith(f"{name}.")}


UNTITLED = Titles()


def titles_of(recipe: Mapping[str, Any]) -> Titles:
    """The titles of a chain, or of an evaluation of several models, whose recipe may be invalid. A stage without a
    title is shown by its name, as models are; an evaluation has the title of the stage that it measures, so that both
    are shown together."""
    listed = _by_name(recipe.get("stages"))
    stages = {name: str(stage.get("title") or name) for name, stage in listed.items()}
    places: dict[str, str] = {}
    for name, stage in listed.items():
        place = stage.get("results")
        if isinstance(place, str):
            entry = place.partition(".")[2]
            if not stage.get("title"):
                stages[name] = stages.get(_maker(stage)) or stages.get(entry, entry)
            places.setdefault(place, stages[name])
    if isinstance(models := recipe.get("models"), dict):
        stages |= {str(name): str(name) for name in models}
        places |= {f"stages.{name}": str(name) for name in models}
    compared = _by_name(recipe.get("compare"))
    comparisons = {name: str(entry.get("title") or name) for name, entry in compared.items()}
    titled = recipe.get("task_titles")
    tasks = {str(task): str(title) for task, title in titled.items()} if isinstance(titled, dict) else {}
    return Titles(stages, places, comparisons, tasks)


def _by_name(entries: Any) -> dict[str, dict[str, Any]]:
    mappings = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {str(entry["name"]): entry for entry in mappings if "name" in entry}


def _maker(stage: Mapping[str, Any]) -> str:
    """The stage that produced this one's model, from its `model.path: ${NAME}`."""
    model = stage.get("model")
    reference = re.fullmatch(r"\$\{([^}.]+)\}", str(model.get("path"))) if isinstance(model, dict) else None
    return reference[1] if reference else ""
