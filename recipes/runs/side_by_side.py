"""Several models measured by one recipe: a run of each in a directory of its own, all compared on the same rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.run_files import RECIPE, RESULTS, SAMPLES
from conversations.sections import StageRecipe
from recipes.files import read_json, write_json, write_text
from recipes.lock import hold_directory
from recipes.processes import is_main, wait_for_all
from recipes.recipe.loader import Loaded
from recipes.results.columns import POINTS, VERSION
from recipes.results.figures import RESULTS_VERSION, Outcome, compared, read_outcomes
from recipes.runs.directory import dump_text, inspect
from recipes.runs.manifest import new_manifest, read_manifest, write_manifest


def parts_of(loaded: Loaded[StageRecipe]) -> dict[str, Loaded[StageRecipe]]:
    """The runs of a recipe with several models, by name."""
    parts = loaded.recipe.parts()
    return {name: Loaded(part, loaded.path, loaded.smoke, [], loaded.use_cache) for name, part in parts.items()}


def run_parts(loaded: Loaded[StageRecipe], run: Callable[[Loaded[StageRecipe]], Any]) -> tuple[bool, dict[str, Any]]:
    """Run what is missing of each model's run, one after the other, and compare them in results.json.

    A model whose run fails does not keep the others from theirs.

    Args:
        run: runs one of them; its outcome's `status` is "done_before" if there was nothing to do.

    Returns:
        Whether anything was missing, and the manifest.

    Raises:
        ToolkitError: runs failed, with the fault of each; the results of the others are written.
    """
    began, folder = time.monotonic(), Path(loaded.recipe.output_dir)
    state = inspect(folder, loaded.resolved)
    with hold_directory(folder):
        if is_main():
            write_text(folder / RECIPE, dump_text(loaded.resolved))
        wait_for_all()
        missing, failed = state.status != "finished", dict[str, Exception]()
        for name, part in parts_of(loaded).items():
            try:
                missing |= run(part).status != "done_before"
            except ValueError as error:  # ToolkitError and ModelError
                if type(error).__name__ not in ("ToolkitError", "ModelError"):
                    raise
                failed[name] = error
        if missing and is_main():
            _close(loaded, folder, "failed" if failed else "finished", began)
        wait_for_all()
    if failed:
        models_of: dict[str, list[str]] = {}
        for name, error in failed.items():
            models_of.setdefault(str(error), []).append(name)
        faults = "\n".join(f"{', '.join(names)}: {fault}" for fault, names in models_of.items())
        others = len(failed) < len(loaded.recipe.parts())
        raise ToolkitError(faults + (f"; figures of the others are in {folder / RESULTS}" if others else ""))
    return missing, read_manifest(folder)


def _close(loaded: Loaded[StageRecipe], folder: Path, status: str, began: float) -> None:
    """Write results.json and the manifest."""
    runs = {name: folder / name for name in loaded.recipe.parts()}
    write_json(folder / RESULTS, compare_runs(runs, loaded.recipe.seed))
    manifests = [read_manifest(run) for run in runs.values()]
    manifest = new_manifest(loaded.path, loaded.recipe.seed)
    manifest["data"] = manifests[0].get("data", [])  # the same for all
    manifest["status"], manifest["seconds"] = status, time.monotonic() - began
    manifest["peak_memory_gb"] = max(one.get("peak_memory_gb", 0.0) for one in manifests)
    write_manifest(folder, manifest)


def compare_runs(runs: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """results.json: the figures of each run, and the changes of every task between every two of them."""
    measured = {name: folder for name, folder in runs.items() if (folder / RESULTS).is_file()}
    results: dict[str, Any] = {VERSION: RESULTS_VERSION, "seed": seed, "stages": {}}
    for name, folder in measured.items():
        results["stages"][name] = {key: value for key, value in read_json(folder / RESULTS).items() if key != VERSION}
    tasks = dict.fromkeys(task for folder in measured.values() for task in _tasks(folder))
    for task in tasks:
        outcomes = {name: read_outcomes(folder, task) for name, folder in measured.items()}
        for before, after in combinations(measured, 2):
            if change := _change(outcomes[before], outcomes[after]):
                key = f"{task}: {before} to {after}"
                results[key] = {"before": before, "after": after, "task": task, "change": change}
    return results


def _change(before: Mapping[str, Mapping[Any, Outcome]], after: Mapping[str, Mapping[Any, Outcome]]) -> dict[str, Any]:
    return {kind: compared(before[kind], after[kind], points=f"_{kind}" == POINTS) for kind in before if kind in after}


def _tasks(folder: Path) -> Sequence[str]:
    """The tasks of a run's samples, in their order."""
    from deepseek_v2_modeling.training import read_lines

    return list(dict.fromkeys(str(line.get("task")) for line in read_lines(folder / SAMPLES)))
