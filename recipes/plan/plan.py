"""`dsv2 plan`: the memory, operations and GPUs that a training recipe needs, from its model's config alone."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from conversations.errors import ToolkitError
from conversations.reading.locating import names_files
from conversations.row_cache import RowCache
from conversations.sections import StageRecipe, TrainingRecipe
from deepseek_v2_modeling import DeepseekV2Config
from deepseek_v2_modeling.training import quiet_libraries
from recipes.chains.plan import naming_stage, plan_stages
from recipes.data.encoding import encoder
from recipes.plan.layouts import USABLE, fits, smallest
from recipes.plan.load import Lengths, known_settings, load_of
from recipes.plan.measure import Figures, measure
from recipes.plan.measure import plan as run_length
from recipes.plan.memory import Layout, Load, Memory, memory
from recipes.plan.text import GB, Gpu, memory_table, step_lines, verdict, weights_line
from recipes.recipe.loader import load_recipe, of_chain, of_stage
from recipes.recipe.paths import GENERATED, is_hub_name
from recipes.recipe.schema import ChainRecipe
from recipes.runs.caching import row_cache
from recipes.runs.foundation import Earlier, Foundation, coming, find_model
from recipes.runs.prepare import Inputs, check_settings, read_list, will_give
from recipes.runs.training_fields import setting
from recipes.stages import stages


def print_plan(arguments: argparse.Namespace) -> None:
    """Print what a recipe, or each training stage of a chain, needs.

    Raises:
        ToolkitError, ModelError: the recipe, an option or a model is wrong.
    """
    gpu = read_gpu(arguments)
    quiet_libraries()
    use_cache = not arguments.no_cache
    loaded = load_recipe(arguments.recipe, arguments.overrides, smoke=arguments.smoke, use_cache=use_cache)
    cache, earlier = row_cache(use_cache), {}
    if not isinstance(loaded.recipe, ChainRecipe):
        _print_stage(loaded.path.stem, of_stage(loaded, stages()).recipe, earlier, cache, gpu)
        return
    for name, stage in plan_stages(of_chain(loaded)):
        with naming_stage(name):
            earlier |= _print_stage(name, stage.recipe, earlier, cache, gpu)


def read_gpu(arguments: argparse.Namespace) -> Gpu:
    """The GPU that the options describe.

    Raises:
        ToolkitError: a number that no GPU has.
    """
    gpu = Gpu(arguments.gpu_gb, arguments.gpu_tflops, arguments.mfu)
    for option, value, most in (("--gpu-gb", gpu.gb, 1e6), ("--gpu-tflops", gpu.teraflops, 1e6), ("--mfu", gpu.mfu, 1)):
        if not 0 < value <= most:
            raise ToolkitError(f"{option} is {value:g}; it must be over 0 and at most {most:g}")
    return gpu


def _print_stage(name: str, recipe: StageRecipe, earlier: Earlier, cache: RowCache, gpu: Gpu) -> Earlier:
    """Print the plan of a stage; returns what it will give to later ones."""
    if not isinstance(recipe, TrainingRecipe):
        print(f"{name}: {recipe.stage} trains nothing; not planned")
        return will_give(recipe, Inputs(Foundation(), None))
    check_settings(recipe)
    foundation = find_model(recipe.model, earlier, ask_hub=False)
    settings = known_settings(recipe, foundation)
    if settings is None:
        foundation = find_model(recipe.model, earlier, ask_hub=True)
        settings = known_settings(recipe, foundation)
    assert settings is not None  # looking it up on the hub gives it, or an error
    stored = f", quantised to {recipe.model.quantization}" if recipe.model.quantization else ""
    print(f"{name}: {recipe.stage} from {recipe.model.path}, {recipe.model.dtype}{stored}")
    print("\n".join(stage_lines(recipe, settings, foundation, _measured(recipe, foundation, earlier, cache), gpu)))
    return will_give(recipe, Inputs(foundation, settings))


def stage_lines(
    recipe: TrainingRecipe, settings: DeepseekV2Config, foundation: Foundation, figures: Figures | None, gpu: Gpu
) -> Iterator[str]:
    """The plan of a stage. figures: token counts of its rows, if they were read."""
    lengths = Lengths(max(figures.report.lengths) if figures else None)
    load = load_of(recipe, settings, lengths, foundation)
    own, found = _own_and_found(recipe, load, gpu)
    yield weights_line(load)
    yield from memory_table([own] if found is None or fits(own, gpu.gb * GB) else [own, found])
    yield from verdict(found, own, gpu)
    plan = run_length(recipe, round(len(figures.report.lengths) * figures.scale), figures) if figures else None
    runs = own if found is None or fits(own, gpu.gb * GB) else found
    yield from step_lines(recipe, load, lengths, runs.layout.fsdp, gpu, plan)


def _own_and_found(recipe: TrainingRecipe, load: Load, gpu: Gpu) -> tuple[Memory, Memory | None]:
    """The memory as the recipe is, and on the fewest GPUs that are enough."""
    layout = Layout(recipe.parallel.fsdp, recipe.parallel.ep) if recipe.parallel else Layout()
    own = memory(load, layout, USABLE * gpu.gb * GB)
    return own, smallest(load, gpu.gb * GB)


def memory_line(recipe: TrainingRecipe, foundation: Foundation, figures: Figures | None) -> str | None:
    """What `dsv2 check` says about memory; None for a model whose config is not known."""
    settings = known_settings(recipe, foundation)
    if settings is None:
        return None
    load = load_of(recipe, settings, Lengths(max(figures.report.lengths) if figures else None), foundation)
    gpu = Gpu()
    own, found = _own_and_found(recipe, load, gpu)
    said = list(verdict(found, own, gpu))[:2]
    return f"memory: {'; '.join(said)} (dsv2 plan says what takes it)"


def _measured(recipe: TrainingRecipe, foundation: Foundation, earlier: Earlier, cache: RowCache) -> Figures | None:
    """Token counts of the rows of `data`; None if they are on the hub or not there yet, or without a tokenizer."""
    listed = next(rows for rows in recipe.row_lists() if rows.name == "data")
    paths = [entry.path for entry in listed.entries]
    if foundation.tokenizer is None or any(coming(path, earlier) or _on_hub(path) for path in paths):
        return None
    rows = read_list(recipe, listed, cache).mixture.rows
    tokenizer = foundation.tokenizer
    return measure(rows, encoder(recipe, tokenizer, setting(recipe, "max_length")), tokenizer, listed.limit)


def _on_hub(path: str) -> bool:
    return not path.startswith(GENERATED) and not names_files(Path(path)) and is_hub_name(path)
