"""`dsv2 check`: a recipe and its data, without loading weights or making a model."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from recipes.data import Mixture, read_sources
from recipes.loader import Loaded
from recipes.quiet import quiet_libraries

SAMPLED = 2000
Row = dict[str, Any]


def check(loaded: Loaded) -> None:
    """Print what the recipe would do.

    Raises:
        ToolkitError, ModelError: whatever would stop the run before its first step.
    """
    quiet_libraries()
    if loaded.recipe.stage == "chain":
        from recipes.chain import plan_stages

        for name, stage in plan_stages(loaded):
            print(f"-- {name} ({stage.path.name})")
            _check_stage(stage)
    else:
        _check_stage(loaded)
    print(f"{loaded.path}: ok")


def _check_stage(loaded: Loaded) -> None:
    from recipes.run import check_recipe

    for note in loaded.notes:
        print(f"smoke: {note}")
    recipe = loaded.recipe
    check_recipe(recipe)
    tokenizer = _tokenizer(recipe)
    for key, entries, limit in _sources(recipe):
        mixture = read_sources(entries, recipe.seed, key)
        for line in mixture.lines:
            print(f"{key}: {line}")
        if key == "data":
            check_rows(recipe, mixture.rows)
        rows = mixture.rows[:limit]
        lengths = _lengths(recipe.stage, rows, tokenizer) if tokenizer else []
        if lengths:
            print(f"{key}: {length_summary(lengths, len(rows), _max_length(recipe))}")
        if key == "data" and recipe.stage != "eval":
            print(_steps(recipe, mixture, lengths))


def check_rows(recipe: Any, rows: Sequence[Row]) -> None:
    """Refuse rows that the stage has no use for.

    Raises:
        ToolkitError: the first row that lacks a key the stage needs.
    """
    needed = {
        "sft": ("messages",),
        "reward": ("completion",) if getattr(recipe, "loss", "") == "pointwise" else ("chosen", "rejected"),
    }.get(recipe.stage, ())
    for number, row in enumerate(rows, start=1):
        missing = [key for key in needed if key not in row]
        if missing:
            raise ToolkitError(
                f"data: row {number} has no {' and no '.join(missing)} (it has {', '.join(row)}), which stage "
                f"{recipe.stage} needs"
            )


def length_summary(lengths: Sequence[int], rows: int, max_length: int | None) -> str:
    """Token lengths in one line; `rows` of which `lengths` may be a sample."""
    ordered = sorted(lengths)
    of = f"{len(ordered):,} of {rows:,} rows" if len(ordered) < rows else f"{rows:,} rows"
    text = (
        f"tokens of {of}: shortest {ordered[0]:,}, median {ordered[len(ordered) // 2]:,}, "
        f"95 % up to {ordered[math.ceil(0.95 * len(ordered)) - 1]:,}, longest {ordered[-1]:,}"
    )
    if max_length is None:
        return text
    over = sum(length > max_length for length in ordered)
    return f"{text}; {over:,} longer than max_length {max_length:,}"


def _sources(recipe: Any) -> Iterator[tuple[str, Any, int | None]]:
    """(key, entries, row limit) of every list of data in a recipe."""
    if recipe.data:
        yield "data", recipe.data, None
    if getattr(recipe, "eval_data", None):
        yield "eval_data", recipe.eval_data, None
    for index, task in enumerate(getattr(recipe, "tasks", ())):
        if task.data:
            yield f"tasks.{index}.data", task.data, task.limit


def _tokenizer(recipe: Any) -> Any:
    """The model's tokenizer where the model is on this machine."""
    from deepseek_v2_modeling.loading import load_tokenizer, resolve_source

    path = Path(recipe.model.path)
    if path.exists():
        source = resolve_source(path)
        if Path(source.tokenizer_dir).exists():
            return load_tokenizer(source)
    how = f"preset {recipe.model.preset} would make it" if recipe.model.preset else "it would be fetched from the hub"
    if not recipe.model.preset:
        resolve_source(path)
    print(f"model: {path} is not here ({how}); token lengths are not counted")
    return None


def _lengths(stage: str, rows: Sequence[Row], tokenizer: Any) -> list[int]:
    from conversations.rendering import render_conversation

    step = max(1, len(rows) // SAMPLED)
    chosen = [_conversation(stage, rows[index], index + 1) for index in range(0, len(rows), step)]
    return [len(render_conversation(messages, tokenizer)["input_ids"]) for messages in chosen]


def _conversation(stage: str, row: Row, number: int) -> list[Row]:
    from conversations.prompts import prompt_of

    if stage in ("sft", "reward") and "messages" in row:
        return row["messages"]
    answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
    longest = max(answers, key=lambda turns: len(str(turns)), default=[])
    prompt = prompt_of(row, number)
    return prompt if stage == "rl" else [*prompt, *longest]


def _max_length(recipe: Any) -> int | None:
    if recipe.stage not in ("sft", "reward"):
        return None
    from recipes.training_fields import config_class

    return recipe.training.get("max_length", config_class(recipe.stage).max_length)


def _steps(recipe: Any, mixture: Mixture, lengths: Sequence[int]) -> str:
    """How many updates the run has, as far as it can be told without packing the rows."""
    from recipes.ranks import world_size
    from recipes.training_fields import config_class

    config = config_class(recipe.stage)

    def setting(name: str) -> Any:
        return recipe.training.get(name, getattr(config, name, None))

    batch = setting("per_device_train_batch_size") * setting("gradient_accumulation_steps") * world_size()
    samples = float(len(mixture.rows))
    about = ""
    if recipe.stage == "rl":
        samples *= setting("num_generations") * setting("num_iterations")
    elif recipe.stage == "sft" and setting("packing") and lengths and setting("max_length"):
        mean = sum(min(length, setting("max_length")) for length in lengths) / len(lengths)
        samples, about = samples * mean / setting("max_length"), "about "
    epochs = setting("num_train_epochs")
    steps = setting("max_steps")
    if steps is None or steps <= 0:
        steps = math.ceil(math.ceil(samples / batch) * epochs)
    passes = steps * batch / samples if samples else 0
    limit = f", or {recipe.max_seconds:g} s" if recipe.max_seconds else ""
    return f"training: {about}{steps:,} steps of batch {batch} ({passes:.2f} times through the data){limit}"
