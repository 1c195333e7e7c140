"""`dsv2 check`: checks a recipe and its data without loading weights or creating a model.

Its output is also written to a page, OUTPUT_DIR.check.html, beside the run directory, which is not created.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from conversations.errors import ToolkitError
from conversations.sections import FormatSection, StageRecipe, TrainingRecipe
from deepseek_v2_modeling.training import describe_computation, quiet_libraries
from recipes.chains.plan import PLANNED_TOKENS, plan_stages
from recipes.check.histogram import bins, text_lines
from recipes.check.page import DataView, StageView, write_page
from recipes.data.encoding import encoder
from recipes.data.sources import Mixture
from recipes.plan.measure import Example, Figures, Plan, measure, plan
from recipes.plan.plan import memory_line
from recipes.recipe.loader import Loaded, of_chain, of_stage
from recipes.recipe.schema import ChainRecipe, Recipe
from recipes.runs.caching import row_cache
from recipes.runs.directory import inspect
from recipes.runs.prepare import Inputs, prepare, will_give
from recipes.runs.side_by_side import parts_of
from recipes.runs.training_fields import setting
from recipes.stages import stage_of, stages

_SHOWN = 600  # characters of an example shown on the terminal
# Marks around trained text on the terminal.
_TRAINED = ("\u27e6", "\u27e7")


def check(loaded: Loaded[Recipe]) -> None:
    """Print what the recipe would do, and write the same to a page.

    Raises:
        ToolkitError, ModelError: anything that would stop the run before its first step.
    """
    quiet_libraries()
    views, earlier = [], {}
    for name, stage in _stages(loaded):
        for note in stage.notes:
            print(f"smoke: {note}")
        if not isinstance(loaded.recipe, ChainRecipe):
            inspect(Path(stage.recipe.output_dir), stage.resolved)
        inputs = prepare(stage.recipe, earlier, cache=row_cache(loaded.use_cache))
        earlier |= will_give(stage.recipe, inputs)
        views.append(_measure_stage(name, stage, inputs))
    page = write_page(Path(loaded.recipe.output_dir), str(loaded.path), views)
    print(f"{loaded.path}: ok; {page}")


def _stages(loaded: Loaded[Recipe]) -> Iterator[tuple[str, Loaded[StageRecipe]]]:
    """Yield the recipe with its file's name, each of its parts with its own, or each stage of a chain."""
    if not isinstance(loaded.recipe, ChainRecipe):
        stage = of_stage(loaded, stages())
        parts = parts_of(stage)
        if parts:
            inspect(Path(stage.recipe.output_dir), stage.resolved)
        for name, part in parts.items() or [(loaded.path.stem, stage)]:
            if parts:
                print(f"-- {name} ({part.recipe.model.path})")
            yield name, part
        return
    from recipes.chains.chain import refuse_other_chain

    refuse_other_chain(of_chain(loaded), Path(loaded.recipe.output_dir))
    for name, stage in plan_stages(of_chain(loaded)):
        print(f"-- {name} ({stage.path.name})")
        yield name, stage


def _measure_stage(name: str, loaded: Loaded[StageRecipe], inputs: Inputs) -> StageView:
    recipe, tokenizer = loaded.recipe, inputs.foundation.tokenizer
    form = form_of(recipe)
    max_length = setting(recipe, "max_length") if form and isinstance(recipe, TrainingRecipe) else None
    view = StageView(name, loaded.path.name, max_length, form, stage_of(recipe))
    if tokenizer is None:
        view.missing = f"{recipe.model.path} is not on this machine; tokens are not counted"
        print(f"model: {view.missing}")
    for note in inputs.notes:
        print(note)
    for key in inputs.later:
        print(f"{key}: written by an earlier stage; its rows are checked once that stage has run")
    for read in inputs.lists:
        key, mixture, figures = read.listed.key, read.mixture, None
        if tokenizer is not None:
            encode = encoder(recipe, tokenizer, max_length)
            figures = measure(mixture.rows, encode, tokenizer, read.listed.limit)
            if not figures.pieces:
                raise ToolkitError(f"{key}: {figures.report.nothing_left(max_length)}")
        lines = [f"{key}: {line}" for line in (*mixture.lines, *_described(recipe, mixture, figures, max_length))]
        print("\n".join(lines))
        view.data.append(DataView(key, mixture, figures))
        if isinstance(recipe, TrainingRecipe) and key == "data":
            view.plan = plan(recipe, len(mixture.rows), figures)
            print(plan_line(recipe, view.plan, figures))
            print(f"training: {describe_computation(recipe.training, recipe.model.dtype)}")
            if line := memory_line(recipe, inputs.foundation, figures):
                print(line)
            print("\n".join(_examples(figures.examples if figures else ())), end="")
    return view


def _described(recipe: StageRecipe, mixture: Mixture, figures: Figures | None, max_length: int | None) -> Iterator[str]:
    """Yield the token counts, line by line."""
    if figures is None:
        return
    if figures.sampling:
        yield figures.sampling
    marked = stage_of(recipe).marks_tokens
    for source, file in enumerate(mixture.files):
        tokens, trained = figures.tokens_of(source)
        of_these = f", {trained:,} of them trained" if marked else ""
        yield f"{Path(file['path']).name}: {figures.about}{tokens:,} tokens in {file['used']:,} rows{of_these}"
    spread = bins(figures.report.lengths, figures.scale)
    yield length_summary(figures.report.lengths, max_length)
    yield "\n".join(["histogram of tokens per row:", *(f"  {line}" for line in text_lines(spread))])
    if form := form_of(recipe):
        yield figures.fate(form.too_long, max_length)


def form_of(recipe: StageRecipe) -> FormatSection | None:
    """How rows are cut, where whole rows are trained on; None where they are prompts."""
    return getattr(recipe, "format", None) if stage_of(recipe).encode else None


def length_summary(lengths: Sequence[int], max_length: int | None) -> str:
    """Token lengths of rows in one line."""
    ordered = sorted(lengths)
    text = (
        f"tokens per row: shortest {ordered[0]:,}, median {ordered[len(ordered) // 2]:,}, "
        f"95 % up to {ordered[math.ceil(0.95 * len(ordered)) - 1]:,}, longest {ordered[-1]:,}"
    )
    if max_length is None:
        return text
    over = sum(length > max_length for length in ordered)
    return f"{text}; {over:,} of {len(ordered):,} rows longer than max_length {max_length:,}"


def plan_line(recipe: TrainingRecipe, plan: Plan, figures: Figures | None) -> str:
    """The length of the run: "training: 500 steps of batch 64 (40 per epoch of 120,000 tokens; 12.50 epochs)"."""
    guessed = figures is None or figures.step > 1
    tokens = f" of {figures.about}{figures.tokens:,} tokens" if figures and stage_of(recipe).encode else ""
    packed = "" if plan.packs is None else f", {plan.packs:,} packs {100 * (plan.fill or 0):.1f} % full"
    limit = f", or {recipe.max_seconds:g} s" if recipe.max_seconds else ""
    if recipe.max_tokens:
        is_known = recipe.max_tokens != PLANNED_TOKENS
        limit += f", or {recipe.max_tokens:,} tokens" if is_known else ", or as many tokens as an earlier stage"
    return (
        f"training: {'about ' if guessed else ''}{plan.steps:,} steps of batch {plan.batch} "
        f"({plan.steps_per_epoch:,} per epoch{tokens}{packed}; {plan.passes:.2f} epochs){limit}"
    )


def _examples(examples: Sequence[Example]) -> Iterator[str]:
    """Yield the examples as text, with marks around what is trained."""
    for number, example in enumerate(examples, start=1):
        text = "".join(f"{_TRAINED[0]}{part}{_TRAINED[1]}" if trained else part for part, trained in example.runs)
        more = " ..." if len(text) > _SHOWN or example.more else ""
        yield f"example {number} ({example.title}; {_TRAINED[0]}trained{_TRAINED[1]}): {text[:_SHOWN]}{more}\n"
