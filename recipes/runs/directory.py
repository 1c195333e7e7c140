"""Inspects a run directory before a run: new, to be resumed, finished, or another recipe's."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conversations.errors import ToolkitError
from conversations.run_files import CHECKPOINT, FINAL, MANIFEST, RECIPE, REWARD_STATS
from conversations.sections import StageRecipe
from recipes.files import read_json
from recipes.recipe.yaml_text import parse_yaml, read_mapping
from recipes.stages import stage_of, stages

_CHECKPOINT = re.compile(rf"{CHECKPOINT}(\d+)")
_SHOWN = 6
_OF_SPREAD = ("parallel", "training.per_device_train_batch_size", "training.gradient_accumulation_steps")


@dataclass(frozen=True)
class State:
    """What a run directory holds: nothing worth keeping, a run to resume (from a checkpoint, or from the answers that
    an evaluation has written), or a finished run.

    fault: why a finished run has to be resumed anyway. spread: whether its weights are, or were, shared by processes.
    """

    status: Literal["new", "resume", "finished"]
    checkpoint: Path | None = None
    fault: str | None = None
    spread: bool = False


def inspect(run_dir: Path, resolved: dict[str, Any]) -> State:
    """Compare a run directory with the recipe about to use it. Writes nothing.

    Args:
        run_dir: the recipe's output_dir.
        resolved: the recipe as recipe.yaml would hold it.

    Raises:
        ToolkitError: it is not a directory, or holds other files, symbolic links or another recipe's run.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ToolkitError(f"output_dir {run_dir} is a file; choose another output_dir")
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else []
    visible = sorted(name for name in names if not name.startswith("."))
    if not visible:
        return State("new")
    if RECIPE not in visible:
        raise ToolkitError(
            f"output_dir {run_dir} contains other files ({', '.join(visible[:3])}) but no run; "
            "choose another output_dir"
        )
    if links := [path.name for path in run_dir.iterdir() if path.is_symlink()]:
        raise ToolkitError(
            f"{run_dir / min(links)} is a symbolic link; a run truncates and removes its files: replace the link "
            "with what it points to, or choose another output_dir"
        )
    checkpoint, previous = newest_checkpoint(run_dir), read_mapping(run_dir / RECIPE)
    goes_on = checkpoint is not None or _has_begun(run_dir, previous.get("stage"))
    results = {stage.result for stage in stages().values()}
    if not goes_on and not any((run_dir / result).exists() for result in results):
        return State("new")
    different = _that_matter(differences(previous, parse_yaml(dump_text(resolved), RECIPE)), previous, resolved)
    if different:
        raise ToolkitError(
            f"output_dir {run_dir} holds the run of another recipe: {describe(different)}; "
            "choose another output_dir, or move that run away"
        )
    spread = bool(previous.get("parallel") or resolved.get("parallel"))
    if not has_ended(run_dir):
        return State("resume" if goes_on else "new", checkpoint, spread=spread)
    fault = missing_of_result(run_dir, stages()[resolved["stage"]].result)
    return State("resume" if goes_on else "new", checkpoint, fault) if fault else State("finished")


def _has_begun(run_dir: Path, name: Any) -> bool:
    """Whether a stage that resumes without checkpoints has written any results; each of its processes has a file."""
    stage = stages().get(str(name))
    if stage is None or stage.continues is None:
        return False
    return any(path.stat().st_size for path in run_dir.glob(f"{Path(stage.continues).stem}*.jsonl"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint-N directory with the highest N; checkpoints are complete, since they are written atomically."""
    folders = [path for path in run_dir.glob(f"{CHECKPOINT}*") if path.is_dir()]
    by_step = [(int(match[1]), path) for path in folders if (match := _CHECKPOINT.fullmatch(path.name))]
    return max(by_step)[1] if by_step else None


def differences(old_recipe: Any, new_recipe: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys that differ between two recipes, with both values; a missing key counts as None."""
    if isinstance(old_recipe, dict) and isinstance(new_recipe, dict):
        differing: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys([*old_recipe, *new_recipe]):
            differing |= differences(old_recipe.get(key), new_recipe.get(key), f"{path}.{key}" if path else str(key))
        return differing
    if isinstance(old_recipe, list) and isinstance(new_recipe, list) and len(old_recipe) == len(new_recipe):
        differing = {}
        for index, (old, new) in enumerate(zip(old_recipe, new_recipe, strict=True)):
            differing |= differences(old, new, f"{path}.{index}")
        return differing
    return {} if old_recipe == new_recipe else {path: (old_recipe, new_recipe)}


def _that_matter(different: dict[str, tuple[Any, Any]], old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A run whose weights are shared among processes resumes with another number of them: how its global batch (which
    identity.py compares) is divided does not matter."""
    if not (old.get("parallel") or new.get("parallel")):
        return different
    return {key: values for key, values in different.items() if not key.startswith(_OF_SPREAD)}


def describe(different: dict[str, tuple[Any, Any]]) -> str:
    """Differing keys in words: `seed is 1 there and 2 here`."""
    phrases = [
        f"{key} is {_short(previous)} there and {_short(current)} here"
        for key, (previous, current) in different.items()
    ]
    more = len(phrases) - _SHOWN
    return ", ".join(phrases[:_SHOWN]) + (f", and {more} more" if more > 0 else "")


def dump_text(resolved: dict[str, Any]) -> str:
    """The text of recipe.yaml."""
    import yaml

    return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=110)


def is_finished(recipe: StageRecipe) -> bool:
    """Whether a recipe's run has finished and its result is complete."""
    run_dir = Path(recipe.output_dir)
    return has_ended(run_dir) and missing_of_result(run_dir, stage_of(recipe).result) is None


def has_ended(run_dir: Path) -> bool:
    """Whether a run has finished successfully, according to its manifest."""
    manifest = read_json(run_dir / MANIFEST)
    return isinstance(manifest, dict) and manifest.get("status") == "finished"


def missing_of_result(run_dir: Path, result: str) -> str | None:
    """What is missing from or broken in a run's result (final/ or a file); None if it is complete. Of weight files only
    headers and sizes are checked."""
    if result != FINAL:
        complete = _is_json(run_dir / result) if result.endswith(".json") else (run_dir / result).is_file()
        return None if complete else f"{result} is missing or broken"
    final = run_dir / FINAL
    if not final.is_dir():
        return "final/ is missing"
    adapter = (final / "adapter_config.json").exists()
    texts = ["adapter_config.json" if adapter else "config.json", "tokenizer_config.json"]
    index = final / "model.safetensors.index.json"
    if index.exists() and not adapter:
        texts.append(index.name)
    if Path(REWARD_STATS).stem in (read_json(run_dir / MANIFEST) or {}).get("metrics", {}):
        texts.append(REWARD_STATS)
    for name in texts:
        if not _is_json(final / name):
            return f"final/{name} is missing or broken"
    shards = set(read_json(index).get("weight_map", {}).values()) if index.name in texts else set()
    single = "adapter_model.safetensors" if adapter else "model.safetensors"
    broken = (name for name in sorted(shards or {single}) if not _is_safetensors(final / name))
    return next((f"final/{name} is missing or broken" for name in broken), None)


def _is_json(path: Path) -> bool:
    try:
        return isinstance(read_json(path), dict)
    except (OSError, ToolkitError):
        return False


def _is_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return bool(file.keys())
    except (OSError, SafetensorError):
        return False


def _short(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
