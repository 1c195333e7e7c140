"""`--smoke`: shrinks a real recipe to toy size."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recipes.recipe.overrides import merge
from recipes.recipe.schema import ENTRY_KEYS
from recipes.stages import stage_written

_ABSENT = object()
# Fields of `training`, their values that need evaluations, of which a smoke run has none, and what it has instead.
_BY_EVALUATIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "load_best_model_at_end": ((True,), False),
    "eval_on_start": ((True,), False),
    "save_strategy": (("best",), "steps"),
    "lr_scheduler_type": (("reduce_lr_on_plateau", "greedy"), "constant"),
}


def shrink(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Shrink a stage's recipe; also returns one line for each replaced value, as `training.max_steps: 500 -> 2`."""
    tree = copy.deepcopy(tree)
    stage = stage_written(tree)
    lines: list[str] = []
    if stage is not None and stage.training is not None:
        training = tree.get("training")
        tree["training"] = training if isinstance(training, dict) else {}
    for section, values, where in stage.smoke if stage else ():
        value = tree.get(section) if section else tree
        listed = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, part in listed:
            if isinstance(part, dict) and (not where or where in part):
                prefix = f"{section}." if index is None else f"{section}.{index}."
                _replace(part, values, prefix.lstrip("."), lines)
    if stage is not None and stage.training is not None:
        needless = {
            key: other for key, (values, other) in _BY_EVALUATIONS.items() if tree["training"].get(key) in values
        }
        _replace(tree["training"], needless, "training.", lines)
        if tree.get("eval_data"):
            _replace(tree, {"eval_data": []}, "", lines)
        limits = [limit for limit in ("max_seconds", "max_tokens", "early_stopping_patience") if tree.get(limit)]
        _replace(tree, dict.fromkeys(limits), "", lines)
    return tree, lines


def shrink_chain(tree: dict[str, Any], read_tree: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Shrink a chain, by adding overrides to the entries of its stages."""
    tree = copy.deepcopy(tree)
    changed_in: dict[str, list[str]] = {}
    for entry in tree.get("stages") or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("recipe"), str):
            continue
        overrides = {key: value for key, value in entry.items() if key not in ENTRY_KEYS}
        merged = merge(read_tree(Path(entry["recipe"])), overrides)
        small, changed = shrink(merged)
        entry.update({key: value for key, value in small.items() if key not in merged or merged[key] != value})
        for line in changed:
            changed_in.setdefault(line, []).append(str(entry.get("name")))
    return tree, [f"{line} ({', '.join(names)})" for line, names in changed_in.items()]


def _replace(section: dict[str, Any], values: Mapping[str, Any], prefix: str, lines: list[str]) -> None:
    for key, value in values.items():
        old, value = section.get(key, _ABSENT), value(section) if callable(value) else value
        if old is not _ABSENT and old != value:
            lines.append(f"{prefix}{key}: {old!r} -> {value!r}")
        elif old is _ABSENT and value is not None:
            lines.append(f"{prefix}{key}: (not set) -> {value!r}")
        section[key] = value
