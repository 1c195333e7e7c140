"""A chain's stages before they run: each stage's recipe, and what can be known of models that are not made yet."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.sections import StageRecipe
from recipes.chain_references import References
from recipes.loader import Loaded, read_tree
from recipes.overrides import merge
from recipes.rundir import is_finished
from recipes.schema import ChainRecipe, ChainStage, validate

PLANNED_TOKENS = 1  # stands for `${NAME.tokens}` while the stage has not run


def plan_stages(loaded: Loaded) -> Iterator[tuple[str, Loaded]]:
    """Every stage with its checked recipe, as far as it is known before anything has run.

    Where a recipe names the result of an earlier stage that has not finished, what that one starts from stands in for
    it: the result has the same shape.

    Raises:
        ToolkitError: a wrong recipe or override, a `${name}` that names no earlier stage, or a stage whose result is
            not of the kind that is wanted.
    """
    chain: ChainRecipe = loaded.recipe
    references = References(chain)
    coming: dict[str, StageRecipe] = {}  # by run directory
    for entry in chain.stages:
        stage = resolve_stage(loaded, entry, references)
        planned = _with_known_models(stage.recipe, coming, f"stages.{entry.name}.")
        yield entry.name, Loaded(planned, stage.path, stage.smoke)
        output = stage.recipe.output_dir
        references.add(entry.name, output, None if stage.recipe.stage == "eval" else PLANNED_TOKENS)
        if not is_finished(Path(output)):
            coming[output] = planned


def resolve_stage(loaded: Loaded, entry: ChainStage, references: References) -> Loaded:
    """A stage's recipe with the chain's model and seed, then the entry's overrides, then `${name}` filled in.

    Raises:
        ToolkitError: the recipe is missing, of stage chain, or wrong; keys are named as stages.NAME.KEY.
    """
    chain: ChainRecipe = loaded.recipe
    path = Path(entry.recipe)
    tree = read_tree(path)
    prefix = f"stages.{entry.name}."
    if tree.get("stage") == "chain":
        raise ToolkitError(f"{prefix}recipe: {path} is a chain itself; name the recipe of one stage")
    if "output_dir" in entry.overrides:
        raise ToolkitError(f"{prefix}output_dir: a chain's stage writes to OUTPUT_DIR/NAME; leave it out")
    defaults: dict[str, Any] = {"model": chain.model.model_dump(exclude_none=True), "seed": chain.seed}
    if chain.on_nan is not None:
        defaults["on_nan"] = chain.on_nan
    tree = merge(merge(tree, defaults), entry.overrides)
    tree["output_dir"] = str(Path(chain.output_dir) / entry.name)
    recipe = validate(references.fill(tree, prefix), prefix)
    if (entry.results is None) != (recipe.stage != "eval"):
        fault = "say where its figures go, such as stages.sft" if recipe.stage == "eval" else "for evaluations only"
        raise ToolkitError(f"{prefix}results: {fault}")
    return Loaded(recipe, path, loaded.smoke)


def _with_known_models(recipe: Any, coming: Mapping[str, Any], prefix: str) -> Any:
    """The recipe with the start of an unfinished stage in place of its result; a reward model becomes one that may be
    missing."""
    maker = _maker(recipe.model.path, coming)
    if maker is not None:
        _check_kind(maker, f"{prefix}model.path", recipe.head if recipe.stage == "eval" else None)
        known = {"path": maker.model.path, "preset": maker.model.preset}
        config = {**maker.model.config, **recipe.model.config}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={**known, "config": config})})
    rewards = list(getattr(recipe, "rewards", ()))
    for index, entry in enumerate(rewards):
        if maker := _maker(entry.model or "", coming):
            _check_kind(maker, f"{prefix}rewards.{index}.model", "score")
            missing = str(Path(maker.output_dir) / "final" / "(to be made)")
            rewards[index] = entry.model_copy(update={"model": missing, "if_missing": "random"})
    return recipe.model_copy(update={"rewards": rewards}) if rewards else recipe


def _maker(path: str, coming: Mapping[str, Any]) -> Any:
    """The recipe of the unfinished stage whose run directory holds `path`; None for any other path."""
    return next((recipe for run_dir, recipe in coming.items() if path and Path(path).is_relative_to(run_dir)), None)


def _check_kind(maker: Any, key: str, head: str | None) -> None:
    """Refuse what will be no model, or one of the other kind: `head` is that of a model which is used as it is."""
    found = {"eval": "an evaluation", "reward": "a reward model"}.get(maker.stage, "a chat model")
    wanted = {"score": "a reward model", "causal_lm": "a chat model"}.get(head or "", "a model")
    if maker.stage == "eval" or (head and found != wanted):
        raise ToolkitError(f"{key}: {maker.output_dir} will be {found}; name a stage that makes {wanted}")
