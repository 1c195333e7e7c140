"""Runs one stage, from its recipe to a finished run directory.

Everything is read first, so that an error in the recipe, model or data leaves nothing behind; then the run directory is
created, the model loaded and the stage called. Only the main process writes.
"""

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conversations.errors import ToolkitError
from conversations.row_cache import RowCache
from conversations.run_files import FINAL, MANIFEST, RECIPE, REJECTED
from conversations.sections import StageRecipe, SupervisedRecipe, TrainingRecipe
from conversations.stage import Work, provided
from recipes.files import read_json, write_json, write_jsonl, write_text
from recipes.lock import Lock, hold_directory
from recipes.process_settings import keep_freed_memory
from recipes.processes import is_main, join_processes, now, say, wait_for_all, world_size
from recipes.recipe.loader import Loaded
from recipes.results.columns import VERSION
from recipes.results.figures import RESULTS_VERSION, figures
from recipes.results.tables import table_text
from recipes.runs.directory import State, dump_text, inspect
from recipes.runs.manifest import new_manifest, peak_memory_gb, read_manifest, seconds_so_far, write_manifest
from recipes.runs.model_card import renew_card, write_card
from recipes.runs.side_by_side import run_parts
from recipes.stages import stage_of

if TYPE_CHECKING:
    from deepseek_v2_modeling.loading import ModelSource
    from recipes.runs.prepare import Inputs


@dataclass
class Outcome:
    """How a stage ended. `manifest` is its run directory's manifest."""

    status: Literal["finished", "done_before"]
    manifest: dict[str, Any]


def run_stage(loaded: Loaded[StageRecipe]) -> Outcome:
    """Run or resume a stage, unless it is already finished.

    Raises:
        ToolkitError, ModelError: the recipe, the data, the model or the run directory is wrong.
        KeyboardInterrupt: interrupted; the run directory holds a checkpoint if training had begun.
    """
    for note in loaded.notes:
        say(f"smoke: {note}")
    if loaded.recipe.parts():
        ran, manifest = run_parts(loaded, run_stage)
        return Outcome("finished" if ran else "done_before", manifest)
    if world_size() > 1 and isinstance(loaded.recipe, TrainingRecipe):
        join_processes(loaded.recipe.training.get("ddp_timeout"))
    run_dir = Path(loaded.recipe.output_dir)
    if finished := _done_before(run_dir, loaded):  # checked without the lock, which cannot be taken on a read-only disk
        return finished
    with hold_directory(run_dir) as lock:
        return _done_before(run_dir, loaded) or _run(loaded, run_dir, lock)


def _done_before(run_dir: Path, loaded: Loaded[StageRecipe]) -> Outcome | None:
    if inspect(run_dir, loaded.resolved).status != "finished":
        return None
    say(f"{run_dir}: this run is finished; nothing to do")
    return Outcome("done_before", read_manifest(run_dir))


def _run(loaded: Loaded[StageRecipe], run_dir: Path, lock: Lock) -> Outcome:
    from deepseek_v2_modeling.training import Parallel, check_whole, launched_sharding, quiet_libraries
    from recipes.runs.caching import row_cache

    recipe, stage = loaded.recipe, stage_of(loaded.recipe)
    if isinstance(recipe, SupervisedRecipe) and launched_sharding() == "FSDP":
        raise ToolkitError(
            "accelerate launch --use_fsdp: such a run cannot be finished; write parallel: {fsdp: N} in the recipe, and "
            "start it with --processes N"
        )
    if isinstance(recipe, TrainingRecipe) and recipe.parallel is not None:
        Parallel(recipe.parallel.fsdp, recipe.parallel.ep).check(world_size())
    state = inspect(run_dir, loaded.resolved)
    if state.fault:
        say(f"{run_dir}: this run was finished, but {state.fault}; running it again")
    began = time.monotonic()
    quiet_libraries()
    keep_freed_memory()
    if state.checkpoint is not None and isinstance(recipe, TrainingRecipe) and is_main():
        check_whole(state.checkpoint, best=bool(recipe.training.get("load_best_model_at_end")))
    cache = row_cache(loaded.use_cache)
    inputs = _load_inputs(recipe, cache)
    manifest = _open_run(loaded, run_dir, state, inputs)
    try:
        manifest["metrics"] = metrics = _work(recipe, run_dir, state, inputs, cache, manifest)
        if stage.measures and is_main():
            write_json(run_dir / stage.result, {VERSION: RESULTS_VERSION, **figures(metrics)})
        _refuse_failures(run_dir, recipe, metrics)
        if stage.result == FINAL and is_main():
            write_manifest(run_dir, manifest)  # the card reads it
            write_card(run_dir)
        lock.make_room()
        _close(run_dir, manifest, "finished", began)
    except BaseException as error:
        lock.make_room()
        with suppress(OSError):  # on a broken disk the original error says more
            _close(run_dir, manifest, "stopped" if isinstance(error, KeyboardInterrupt) else "failed", began)
        raise
    if stage.measures and is_main():
        renew_card(recipe.model.path)
    wait_for_all()
    return Outcome("finished", manifest)


def _refuse_failures(run_dir: Path, recipe: StageRecipe, metrics: Any) -> None:
    """Raise ToolkitError if a task could not be measured; the figures of the others are in the results."""
    stage = stage_of(recipe)
    failed = [name for name, values in metrics.items() if "error" in values] if stage.measures else []
    if not failed:
        return
    if is_main():
        say(table_text({"stages": {Path(recipe.model.path).name: figures(metrics)}}))
    raise ToolkitError(
        f"{', '.join(failed)} failed: {metrics[failed[0]]['error']}; the other figures are in "
        f"{run_dir / stage.result}, and running this again measures only what is missing"
    )


def _load_inputs(recipe: StageRecipe, cache: RowCache) -> "Inputs":
    """Prepare the same inputs as `dsv2 check`, creating a preset's model if it is missing, and seed the random numbers
    used from here on (new adapters and heads)."""
    from transformers import set_seed

    from recipes.runs.models import open_source
    from recipes.runs.prepare import prepare

    inputs = prepare(recipe, ask_hub=True, cache=cache)
    for read in inputs.lists:
        for line in (*read.mixture.lines, read.mixture.read):
            say(f"{read.listed.key}: {line}")
    source, tokenizer = open_source(recipe.model, recipe.seed)
    set_seed(recipe.seed)
    return replace(inputs, foundation=replace(inputs.foundation, source=source, tokenizer=tokenizer))


def _open_run(loaded: Loaded[StageRecipe], run_dir: Path, state: State, inputs: "Inputs") -> dict[str, Any]:
    """Write what is known before the stage begins into the run directory; returns the manifest."""
    before = read_manifest(run_dir) if state.status == "resume" else {}
    recipe = loaded.recipe
    manifest = new_manifest(loaded.path, recipe.seed)
    manifest["data"] = [file for read in inputs.lists for file in read.mixture.files]
    if state.status == "new" and isinstance(recipe, TrainingRecipe):
        _remove_merged(run_dir, inputs.source)
    manifest["start"] = _start(recipe, inputs, run_dir)
    if state.status == "resume":
        spread = state.spread and isinstance(recipe, TrainingRecipe) and recipe.any_processes
        _check_same_start(run_dir, before, manifest, spread)
        for key in ("started", "peak_memory_gb"):
            manifest[key] = before.get(key, manifest[key])
        manifest["seconds"] = seconds_so_far(run_dir, before)
        origin = state.checkpoint or run_dir / str(stage_of(recipe).continues)
        manifest["resumed"] = [*before.get("resumed", []), {"at": now(), "from": str(origin)}]
        say(f"{run_dir}: resuming from {origin.name}")
    wait_for_all()
    try:
        if is_main():
            write_text(run_dir / RECIPE, dump_text(loaded.resolved))
            if state.status == "new":  # the stage appends the rows that it drops itself
                rejected = (row.as_dict() for read in inputs.lists for row in read.mixture.rejected)
                write_jsonl(run_dir / REJECTED, rejected)
        write_manifest(run_dir, manifest)
    except OSError:
        for name in (RECIPE, REJECTED, MANIFEST) if state.status == "new" else ():
            (run_dir / name).unlink(missing_ok=True)
        raise
    wait_for_all()
    return manifest


def _remove_merged(run_dir: Path, source: "ModelSource") -> None:
    """Remove the merged model of an earlier run that left no checkpoint: it may be from another model."""
    from recipes.runs.models import MERGE_DIR

    merged = run_dir / MERGE_DIR
    used = any(Path(path).resolve().is_relative_to(merged.resolve()) for path in (source.base, source.own_dir))
    if is_main() and merged.is_dir() and not used:
        shutil.rmtree(merged)


def _start(recipe: StageRecipe, inputs: "Inputs", run_dir: Path) -> dict[str, Any]:
    """What the run starts from and, if it matters, the number of processes; only the main process reads the
    files."""
    from recipes.runs.identity import extent, fingerprints, merged_base

    files = {**fingerprints(recipe, inputs.source), **merged_base(run_dir)} if is_main() else {}
    return {**(extent(recipe) if isinstance(recipe, TrainingRecipe) else {}), "files": files}


def _check_same_start(run_dir: Path, before: dict[str, Any], manifest: dict[str, Any], spread: bool) -> None:
    from recipes.runs.identity import check_same_start

    if not before:
        raise ToolkitError(
            f"{run_dir} cannot be resumed: {MANIFEST} is missing, which records what the run began with; put it back, "
            "or choose another output_dir"
        )
    for old, new in zip(before.get("data", []), manifest["data"], strict=False):
        if old.get("sha256") != new["sha256"]:
            raise ToolkitError(
                f"{run_dir} cannot be resumed: {new['path']} has changed since the run began; "
                "put the old file back, or choose another output_dir"
            )
    start = {"processes": before.get("processes"), **before.get("start", {})}
    check_same_start(run_dir, start, manifest["start"], spread)


def _load_model(recipe: StageRecipe, source: "ModelSource", run_dir: Path, manifest: dict[str, Any]) -> Any:
    """Load the stage's own model; records in the manifest and prints which parts are trained."""
    from recipes.runs import models
    from recipes.runs.identity import merged_base

    if not isinstance(recipe, TrainingRecipe):
        return models.load_frozen(recipe.model, source, recipe.head)
    model = models.load_for_training(recipe, source, run_dir)
    if is_main():
        manifest["start"]["files"].update(merged_base(run_dir))
    manifest["trained"] = models.adapted_table(model)
    for line in models.table_lines(manifest["trained"]):
        say(line)
    write_manifest(run_dir, manifest)
    return model


def _work(
    recipe: StageRecipe, run_dir: Path, state: State, inputs: "Inputs", cache: RowCache, manifest: dict[str, Any]
) -> Any:
    """Load the models and run the stage; returns its metrics."""
    from deepseek_v2_modeling.loading import load_lm_head
    from deepseek_v2_modeling.training import at
    from recipes.runs.models import load_other_models

    section = recipe.model
    model = _load_model(recipe, inputs.source, run_dir, manifest)
    work = Work(
        model=model,
        tokenizer=inputs.foundation.tokenizer,
        run_dir=run_dir,
        rows={read.listed.name: read.handed for read in inputs.lists},
        others=load_other_models(recipe, inputs.source, model),
        lm_head=load_lm_head(inputs.source, section.dtype, section.attn_implementation)
        if recipe.reads_lm_head
        else None,
        cache=cache,
        resume=state.status == "resume",
        resume_from=state.checkpoint,
    )
    began = time.monotonic()
    with at(f"in the stage {recipe.stage}"):
        metrics = provided(stage_of(recipe).run)(recipe, work)
    manifest["training_seconds"] = metrics.get("seconds", time.monotonic() - began)
    return metrics


def _close(run_dir: Path, manifest: dict[str, Any], status: str, began: float) -> None:
    manifest["status"] = status
    manifest["ended"] = now()
    manifest["seconds"] += time.monotonic() - began
    manifest["peak_memory_gb"] = max(manifest["peak_memory_gb"], peak_memory_gb())
    write_manifest(run_dir, manifest)


def report_outcome(recipe: StageRecipe, outcome: Outcome) -> None:
    """Print where the result is, and an evaluation's metrics.

    Raises:
        ToolkitError: the manifest of a run finished earlier does not contain them.
    """
    stage, run_dir = stage_of(recipe), Path(recipe.output_dir)
    try:
        if recipe.parts():
            say(table_text(read_json(run_dir / stage.result)))
        elif stage.measures:
            name = Path(recipe.model.path).name
            say(table_text({"stages": {name: figures(outcome.manifest["metrics"])}}))
        say(f"{run_dir / stage.result} ({outcome.manifest['seconds']:.0f} s)")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if outcome.status == "finished":
            raise
        raise ToolkitError(
            f"{run_dir / MANIFEST}: does not record the result of the run ({error!r}); put it back"
        ) from error
