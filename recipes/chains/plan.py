"""Checks a chain's stages before they run: each stage's recipe is resolved as far as possible."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.sections import StageRecipe, TrainingRecipe
from recipes.chains.references import References
from recipes.recipe.loader import Loaded, read_tree
from recipes.recipe.overrides import merge
from recipes.recipe.schema import CHAIN, ChainRecipe, ChainStage, validate
from recipes.stages import stage_of

PLANNED_TOKENS = 1  # placeholder for `${NAME.tokens}` until the stage has run


def plan_stages(loaded: Loaded[ChainRecipe]) -> Iterator[tuple[str, Loaded[StageRecipe]]]:
    """Yield every stage's name with its checked recipe, as far as it can be resolved before anything has run.

    Raises:
        ToolkitError: a wrong recipe or override, or a `${name}` that is not an earlier stage.
    """
    chain = loaded.recipe
    references = References(chain)
    tasks: dict[str, dict[str, Any]] = {}  # the tasks of each evaluation stage, by name
    for entry in chain.stages:
        stage = resolve_stage(loaded, entry, references)
        if entry.results:
            recipe: Any = stage.recipe  # one with `results` is an evaluation
            tasks[entry.name] = {task.name: task for task in recipe.tasks}
            _refuse_figures_twice(chain, entry, tasks)
        yield entry.name, stage
        tokens = PLANNED_TOKENS if isinstance(stage.recipe, TrainingRecipe) else None
        references.add(entry.name, stage.recipe.output_dir, tokens)
    _check_comparisons(chain, tasks)


def _refuse_figures_twice(chain: ChainRecipe, entry: ChainStage, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ToolkitError if an earlier evaluation writes a task's figures to the same place in the results."""
    for earlier in chain.stages:
        if earlier is entry:
            return
        if earlier.results == entry.results and (shared := sorted(tasks[entry.name].keys() & tasks[earlier.name])):
            raise ToolkitError(
                f"stages.{entry.name}.results: {earlier.name} also writes its figures of {shared[0]} to "
                f"{entry.results}; name another place"
            )


def _check_comparisons(chain: ChainRecipe, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ToolkitError unless both sides of each comparison have its task and a decoding method in common."""
    for comparison in chain.compare:
        where, sides = f"compare.{comparison.name}", (comparison.before, comparison.after)
        for name in sides:
            if comparison.task not in tasks.get(name, {}):
                available = ", ".join(tasks[name]) if name in tasks else "none: it is not an evaluation"
                raise ToolkitError(f"{where}.task: {name} has no task {comparison.task}; its tasks are {available}")
        before, after = (set(tasks[name][comparison.task].values) for name in sides)
        if not before & after:
            raise ToolkitError(f"{where}: {sides[0]} and {sides[1]} share no temperature of {comparison.task}")


def check_stages(loaded: Loaded[ChainRecipe]) -> None:
    """Check everything about every stage except its data, before the first one runs.

    Raises:
        ToolkitError, ModelError: a stage would be refused later, as far as that can be known.
    """
    from recipes.runs.prepare import check_recipe, will_give

    earlier: dict[str, Any] = {}
    for name, stage in plan_stages(loaded):
        with naming_stage(name):
            earlier |= will_give(stage.recipe, check_recipe(stage.recipe, earlier))


@contextmanager
def naming_stage(name: str) -> Iterator[None]:
    """Prefix error messages with the stage's name."""
    try:
        yield
    except ValueError as error:
        if type(error).__name__ not in ("ToolkitError", "ModelError"):
            raise
        raise type(error)(f"stages.{name}: {error}") from error


def resolve_stage(loaded: Loaded[ChainRecipe], entry: ChainStage, references: References) -> Loaded[StageRecipe]:
    """Build a stage's recipe: the chain's model and seed, then the entry's overrides, then `${name}` references.

    Raises:
        ToolkitError: the recipe is missing, is itself a chain, or is wrong; keys are shown as stages.NAME.KEY.
    """
    chain = loaded.recipe
    path = Path(entry.recipe)
    tree = read_tree(path)
    prefix = f"stages.{entry.name}."
    if tree.get("stage") == CHAIN:
        raise ToolkitError(f"{prefix}recipe: {path} is a chain itself; name the recipe of one stage")
    if "output_dir" in entry.overrides:
        raise ToolkitError(f"{prefix}output_dir: a chain's stage writes to OUTPUT_DIR/NAME; leave it out")
    defaults: dict[str, Any] = {"model": chain.model.model_dump(exclude_none=True), "seed": chain.seed}
    if chain.on_nan is not None:
        defaults["on_nan"] = chain.on_nan
    tree = merge(merge(tree, defaults), entry.overrides)
    tree["output_dir"] = str(Path(chain.output_dir) / entry.name)
    recipe = validate(references.fill(tree, prefix), prefix)
    assert isinstance(recipe, StageRecipe)
    if recipe.parts():
        raise ToolkitError(f"{prefix}models: a stage of a chain measures one model; leave it out")
    measures = stage_of(recipe).measures
    if (entry.results is not None) != measures:
        fault = "set where its figures go, such as stages.sft" if measures else "for evaluations only"
        raise ToolkitError(f"{prefix}results: {fault}")
    return Loaded(recipe, path, loaded.smoke, use_cache=loaded.use_cache)
