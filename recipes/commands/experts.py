"""`dsv2 experts`: which routed experts a data set uses (ESFT); writes an experts file and a page with a heat map."""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conversations.errors import ToolkitError
from conversations.progress import bar
from conversations.rendering.lengths import LengthReport
from conversations.row_cache import RowCache
from conversations.sections import TrainingRecipe
from deepseek_v2_modeling.esft import OFFICIAL_SWITCHES, THRESHOLDS, ExpertScores, Score, score_experts, smallest_set
from deepseek_v2_modeling.training import quiet_libraries
from recipes.data.encoding import encoder
from recipes.data.sources import Mixture
from recipes.files import write_json, write_text
from recipes.html import render_page
from recipes.lock import hold_path
from recipes.processes import say
from recipes.recipe.loader import load_recipe, of_stage
from recipes.report.svg import LOAD_CLASSES, heat_map
from recipes.results.layout import Cell, Table
from recipes.runs.caching import row_cache
from recipes.runs.models import load_frozen, open_source
from recipes.runs.prepare import prepare
from recipes.runs.training_fields import setting
from recipes.stages import stages

BATCH_SIZE = 8


def find_experts(arguments: argparse.Namespace) -> str:
    """Score and choose experts for an SFT recipe's data; writes FILE.json and FILE.html and returns a summary line.

    Raises:
        ToolkitError, ModelError: the recipe, the data, the model or a setting is wrong.
    """
    kind: Score = arguments.score
    threshold = check_threshold(kind, arguments.threshold)
    if arguments.tokens < 1:
        raise ToolkitError(f"--tokens is {arguments.tokens}; it must be at least 1")
    scored = [stage.name for stage in stages().values() if stage.training and stage.marks_tokens]
    use_cache = not arguments.no_cache
    loaded = load_recipe(arguments.recipe, arguments.overrides, smoke=arguments.smoke, use_cache=use_cache)
    recipe = of_stage(loaded, scored).recipe
    assert isinstance(recipe, TrainingRecipe)
    output = output_file(recipe, arguments.output)
    with hold_path(output):
        content = _score(recipe, kind, threshold, arguments.tokens, row_cache(use_cache))
        page = output.with_suffix(".html")
        try:
            write_json(output, content)
            write_page(page, content)
        except OSError as error:
            raise ToolkitError(f"{output}: {error.strerror or error}; choose another file with --output") from error
    return f"{output}: {summary(content)}; {page}"


def _score(recipe: TrainingRecipe, kind: Score, threshold: float, tokens: int, cache: RowCache) -> dict[str, Any]:
    """Build the contents of the experts file for a recipe's data."""
    quiet_libraries()
    mixture = prepare(recipe, ask_hub=True, cache=cache).lists[0].mixture
    source, tokenizer = open_source(recipe.model, recipe.seed)
    for line in mixture.lines:
        say(f"data: {line}")
    sequences = sample(recipe, mixture, tokenizer, tokens)
    model = load_frozen(recipe.model, source, "causal_lm")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with bar("experts", sum(map(len, sequences)), "tokens") as advance:
        scores = score_experts(
            model, sequences, pad_token_id=tokenizer.pad_token_id, batch_size=BATCH_SIZE, progress=advance
        )
    return experts_file(kind, threshold, scores, recipe.model.path, mixture.files)


def check_threshold(kind: Score, requested: float | None) -> float:
    """The share of the scores that the chosen experts must reach; defaults to the paper's value."""
    threshold = THRESHOLDS[kind] if requested is None else requested
    if not 0 < threshold <= 1:
        raise ToolkitError(f"--threshold is {threshold:g}; it must be a share of the scores: above 0, at most 1")
    return threshold


def output_file(recipe: TrainingRecipe, chosen: Path | None) -> Path:
    """The output path: the one requested, the one that the recipe reads, or one beside the run directory."""
    experts_file, folder = recipe.chosen_experts_file, Path(recipe.output_dir)
    output = chosen or (Path(experts_file) if experts_file else folder.with_name(f"{folder.name}.experts.json"))
    if output.suffix != ".json" or output.is_dir():
        raise ToolkitError(f"{output}: an experts file must be named FILE.json; choose one with --output FILE.json")
    return output


def sample(recipe: TrainingRecipe, mixture: Mixture, tokenizer: Any, tokens: int) -> list[list[int]]:
    """Encoded rows as in training, in random order, until there are `tokens` tokens.

    Raises:
        ToolkitError: no row has anything to train on.
    """
    max_length = setting(recipe, "max_length")
    encode = encoder(recipe, tokenizer, max_length)
    report = LengthReport()
    order = list(range(len(mixture.rows)))
    random.Random(f"{recipe.seed}/experts").shuffle(order)
    sequences: list[list[int]] = []
    count = 0
    for row in order:
        for sample in encode(mixture.rows[row], report):
            sequences += [ids for ids, _ in sample]
            count += sum(len(ids) for ids, _ in sample)
        if count >= tokens:
            break
    counts = report.summary(max_length)
    if not sequences:
        raise ToolkitError(f"data: no row is left to score on: {counts}")
    say(f"data: {counts}")
    return sequences


def experts_file(
    kind: Score, threshold: float, scores: ExpertScores, model: str, files: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The file's contents: `experts`, best first, and the switches are as in the official repository's configs."""
    shares = dict(zip(scores.layers, scores.shares[kind].tolist(), strict=True))
    return {
        "experts": {str(layer): smallest_set(values, threshold) for layer, values in shares.items()},
        **dict.fromkeys(OFFICIAL_SWITCHES, False),
        "score": kind,
        "threshold": threshold,
        "rows": scores.rows,
        "tokens": scores.tokens,
        "model": model,
        "data": [{key: file[key] for key in ("path", "sha256")} for file in files],
        "scores": {str(layer): [float(f"{value:.6g}") for value in values] for layer, values in shares.items()},
    }


def summary(content: dict[str, Any]) -> str:
    """The choice in one line."""
    sizes = [len(chosen) for chosen in content["experts"].values()]
    experts = sum(map(len, content["scores"].values()))
    share = f"{100 * content['threshold']:.4g} %"
    return (
        f"{sum(sizes):,} of {experts:,} experts ({min(sizes)} to {max(sizes)} per layer) have {share} of the "
        f"{content['score']} scores of {content['rows']:,} rows, {content['tokens']:,} tokens"
    )


def write_page(page: Path, content: dict[str, Any]) -> None:
    """Write the heat map and the chosen experts as one HTML file without scripts or requests."""
    experts: dict[str, list[int]] = content["experts"]
    scores: dict[str, list[float]] = content["scores"]
    columns = [str(expert) for expert in range(len(next(iter(scores.values()))))]
    loads = [(layer, [value * len(columns) for value in values]) for layer, values in scores.items()]
    marked = [(row, expert) for row, chosen in enumerate(experts.values()) for expert in chosen]
    chosen = [
        [
            Cell(layer),
            Cell(", ".join(map(str, of_layer))),
            Cell(f"{100 * sum(scores[layer][e] for e in of_layer):.1f} %"),
        ]
        for layer, of_layer in experts.items()
    ]
    text = render_page(
        "experts.html.jinja",
        content=content,
        summary=summary(content),
        facts=[
            ("Score", content["score"]),
            ("Threshold", f"{content['threshold']:g}"),
            ("Rows", f"{content['rows']:,}"),
            ("Tokens", f"{content['tokens']:,}"),
            ("Data", ", ".join(file["path"] for file in content["data"])),
        ],
        drawing=heat_map(loads, columns, "expert", f"Scores of experts by layer: {summary(content)}", marked),
        chosen=Table("Chosen experts, best first", [Cell("Layer"), Cell("Experts"), Cell("Their share")], chosen),
        load_classes=LOAD_CLASSES,
    )
    write_text(page, text)
