"""`--smoke`: a recipe at toy size. The one way to shrink a recipe whose settings are real."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.recipe.overrides import merge

SMOKE_STEPS = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "no",
}
SMOKE_TRAINING = {
    "sft": {**SMOKE_STEPS, "max_length": 256},
    "reward": {**SMOKE_STEPS, "max_length": 256},
    # TRL wants both answers to a prompt in one generation batch: two steps' worth of batches of 1.
    "rl": {
        **SMOKE_STEPS,
        "num_generations": 2,
        "max_completion_length": 16,
        "steps_per_generation": 2,
        "generation_batch_size": None,
        "num_generations_eval": None,
    },
}
SMOKE_TASK = {"batch_size": 1, "max_new_tokens": 16, "limit": 2}
_SHRUNK = ("training", "tasks", "eval_data", "max_seconds", "max_tokens")  # what a chain's entry takes from it
_ABSENT = object()


def shrink(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A stage's recipe at toy size, and one line for each value replaced: `training.max_steps: 500 -> 2`."""
    tree = copy.deepcopy(tree)
    stage = tree.get("stage")
    lines: list[str] = []
    if stage in SMOKE_TRAINING:
        training = tree.get("training")
        tree["training"] = training if isinstance(training, dict) else {}
        _replace(tree["training"], SMOKE_TRAINING[stage], "training.", lines)
        if tree["training"].get("load_best_model_at_end"):
            _replace(tree["training"], {"load_best_model_at_end": False}, "training.", lines)
        if tree.get("eval_data"):
            _replace(tree, {"eval_data": []}, "", lines)
        for limit in ("max_seconds", "max_tokens", "early_stopping_patience"):
            if tree.get(limit):
                _replace(tree, {limit: None}, "", lines)
        for index, reward in enumerate(tree.get("rewards") or []) if stage == "rl" else ():
            if isinstance(reward, dict) and "model" in reward:
                _replace(reward, {"if_missing": "random"}, f"rewards.{index}.", lines)
    for index, task in enumerate(tree.get("tasks") or []) if stage == "eval" else ():
        if isinstance(task, dict):
            _replace(task, SMOKE_TASK, f"tasks.{index}.", lines)
    return tree, lines


def shrink_chain(tree: dict[str, Any], read_tree: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """A chain whose stages' entries override their recipes to toy size."""
    tree = copy.deepcopy(tree)
    changed_in: dict[str, list[str]] = {}
    for entry in tree.get("stages") or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("recipe"), str):
            continue
        stage, changed = shrink(merge(read_tree(Path(entry["recipe"])), _overrides(entry)))
        entry.update({key: stage[key] for key in _SHRUNK if key in stage})
        for line in changed:
            changed_in.setdefault(line, []).append(str(entry.get("name")))
    return tree, [f"{line} ({', '.join(names)})" for line, names in changed_in.items()]


def _overrides(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("name", "recipe", "results")}


def _replace(section: dict[str, Any], values: dict[str, Any], prefix: str, lines: list[str]) -> None:
    for key, value in values.items():
        old = section.get(key, _ABSENT)
        if old is not _ABSENT and old != value:
            lines.append(f"{prefix}{key}: {old!r} -> {value!r}")
        elif old is _ABSENT and value is not None:
            lines.append(f"{prefix}{key}: (not set) -> {value!r}")
        section[key] = value
