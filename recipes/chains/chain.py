"""`dsv2 run`: the stages of a chain in order, each in its own directory, in one process.

A finished stage runs again only if its recipe, its data or a model that it starts from has changed: chain.json stores a
fingerprint of its inputs. A run that no longer matches its recipe is moved to .superseded/, never overwritten.
"""

import gc
from contextlib import suppress
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.run_files import RECIPE, RESULTS
from conversations.sections import StageRecipe
from recipes.chains.plan import check_stages, resolve_stage
from recipes.chains.references import References
from recipes.chains.state import ChainState, fingerprint
from recipes.files import write_json, write_text
from recipes.lock import hold_directory, owner_of
from recipes.processes import is_main, now, say, wait_for_all
from recipes.recipe.loader import Loaded
from recipes.recipe.schema import CHAIN, ChainRecipe, ChainStage
from recipes.recipe.yaml_text import read_mapping
from recipes.results.figures import chain_results, outcome_pairs
from recipes.results.tables import table_text
from recipes.results.titles import titles_of
from recipes.runs.directory import dump_text, is_finished
from recipes.runs.manifest import new_manifest, read_manifest, write_manifest
from recipes.runs.stage import run_stage

SUPERSEDED = ".superseded"


def run_chain(loaded: Loaded[ChainRecipe]) -> dict[str, Any]:
    """Run or resume a chain; writes results.json and returns its contents.

    Raises:
        ToolkitError, ModelError: a recipe, the data or the output_dir is wrong; before any stage runs if possible.
        KeyboardInterrupt: interrupted; the same command resumes the chain.
    """
    output = Path(loaded.recipe.output_dir)
    for note in loaded.notes:
        say(f"smoke: {note}")
    with hold_directory(output) as lock:
        refuse_other_chain(loaded, output)
        check_stages(loaded)
        state = _open_chain(loaded, output)
        try:
            results = _run_stages(loaded, state)
            if is_main():
                write_json(output / RESULTS, results)
            costs = {key: results[key] for key in ("seconds", "peak_memory_gb")}
            _say_how_it_ended(output, "finished", **costs)
        except BaseException as error:
            lock.make_room()
            with suppress(OSError):  # on a broken disk the original error says more
                _say_how_it_ended(output, "stopped" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
    say(f"\n{table_text(results, titles_of(loaded.resolved))}\n\n{output / RESULTS}")
    return results


def _run_stages(loaded: Loaded[ChainRecipe], state: ChainState) -> dict[str, Any]:
    chain = loaded.recipe
    references = References(chain)
    for entry in chain.stages:
        stage = resolve_stage(loaded, entry, references)
        _run_entry(entry, stage, state, references)
        references.add(entry.name, stage.recipe.output_dir, state.stages[entry.name]["metrics"].get("tokens"))
    return _collect(chain, state)


def _run_entry(entry: ChainStage, stage: Loaded[StageRecipe], state: ChainState, references: References) -> None:
    """Run one stage unless it has already run with the same inputs."""
    from recipes.runs.models import ensure_model

    run_dir = Path(stage.recipe.output_dir)
    ensure_model(stage.recipe.model.path, stage.recipe.model.preset, stage.recipe.seed)
    used = references.used(stage.recipe)
    now_is = fingerprint(stage, {run_dir: state.stages[name]["fingerprint"] for name, run_dir in used.items()})
    before = state.stages.get(entry.name)
    if before and before["fingerprint"] == now_is and before["status"] == "finished" and is_finished(stage.recipe):
        say(f"-- {entry.name}: already finished")
        return
    if before and before["fingerprint"] != now_is:
        _set_aside(run_dir, entry.name)
    say(f"-- {entry.name}")
    state.begin(entry.name, now_is)
    try:
        run_stage(stage)
    except BaseException:
        with suppress(OSError):  # full disk: the cost so far is in the stage's own manifest
            state.count(entry.name, read_manifest(run_dir))
        raise
    finally:
        _free_memory()
    state.finish(entry.name, read_manifest(run_dir))


def _set_aside(run_dir: Path, name: str) -> None:
    """Move away a run that no longer matches its recipe or inputs."""
    if is_main() and run_dir.exists():
        if owner := owner_of(run_dir):
            raise ToolkitError(f"{run_dir} is in use by {owner}, with another recipe; wait for it to finish or stop it")
        attic = run_dir.parent / SUPERSEDED
        attic.mkdir(exist_ok=True)
        number = next(n for n in range(1, 10**6) if not (attic / f"{name}-{n}").exists())
        run_dir.rename(attic / f"{name}-{number}")
        say(f"{name}: its recipe or input has changed; the old run is now {attic / f'{name}-{number}'}")
    wait_for_all()


def refuse_other_chain(loaded: Loaded[ChainRecipe], output: Path) -> None:
    """Refuse an output directory that already holds some other run.

    Raises:
        ToolkitError: it holds the run of a single stage or of another chain.
    """
    if not (output / RECIPE).exists():
        return
    previous = read_mapping(output / RECIPE)
    remedy = "choose another output_dir, or move that run away"
    if previous.get("stage") != CHAIN:
        raise ToolkitError(f"output_dir {output} holds a run of stage {previous.get('stage')}, not a chain; {remedy}")
    file = read_manifest(output).get("recipe", str(loaded.path.absolute()))  # not written yet if it was killed
    names = [stage.get("name") for stage in previous.get("stages", [])]
    moved = Path(file).name == loaded.path.name and names == [stage.name for stage in loaded.recipe.stages]
    if file != str(loaded.path.absolute()) and not moved:
        raise ToolkitError(f"output_dir {output} holds the run of another chain, {file}; {remedy}")


def _open_chain(loaded: Loaded[ChainRecipe], output: Path) -> ChainState:
    state = ChainState.read(output)
    if state.stages:
        say(f"{output}: resuming this chain")
    wait_for_all()
    if is_main():
        write_text(output / RECIPE, dump_text(loaded.resolved))
    write_manifest(output, new_manifest(loaded.path, loaded.recipe.seed))
    wait_for_all()
    return state


def _collect(chain: ChainRecipe, state: ChainState) -> dict[str, Any]:
    """Collect the results of all evaluations."""
    evaluations: dict[str, dict[str, Any]] = {}
    for entry in chain.stages:
        if entry.results:
            evaluations.setdefault(entry.results, {}).update(state.stages[entry.name]["metrics"])
    comparisons = {
        comparison.name: {
            "task": comparison.task,
            "before": comparison.before,
            "after": comparison.after,
            "change": outcome_pairs(
                Path(chain.output_dir) / comparison.before, Path(chain.output_dir) / comparison.after, comparison.task
            ),
        }
        for comparison in chain.compare
    }
    names = [entry.name for entry in chain.stages]
    return chain_results(chain.seed, evaluations, comparisons, state.seconds(names), state.peak_memory_gb(names))


def _say_how_it_ended(output: Path, status: str, **more: Any) -> None:
    write_manifest(output, {**read_manifest(output), "status": status, "ended": now(), **more})


def _free_memory() -> None:
    """Release the last stage's memory: models in reference cycles, the allocator's free pages."""
    gc.collect()
    with suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
