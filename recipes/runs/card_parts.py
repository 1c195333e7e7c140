"""What a model card shows of runs and evaluations, as data for its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.recipe.paths import is_hub_name
from recipes.results.columns import INTERVAL, SHARE, columns_of, sample_size
from recipes.results.figures import figures
from recipes.runs.directory import dump_text
from recipes.runs.lineage import RunRecord
from recipes.runs.manifest import PACKAGES
from recipes.stages import stage_written

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def on_hub(path: str) -> bool:
    return is_hub_name(path) and not Path(path).exists()


def purpose_of(runs: Sequence[RunRecord], adapter: bool, scores: bool) -> str:
    kind = "A LoRA adapter for" if adapter else "A DeepSeek-V2 model,"
    purpose = "scoring answers (a reward model)" if scores else "chat"
    steps = " and then ".join(_title(run) for run in runs)
    made = f", made by {steps}" if steps else ""
    return f"{kind} {'a DeepSeek-V2 model, ' if adapter else ''}for {purpose}{made} with deepseek-v2-toolkit."


def _title(run: RunRecord) -> str:
    stage = stage_written(run.recipe)
    method = run.recipe.get("method")
    return f"{stage.title if stage else run.recipe.get('stage')}{f' ({method})' if method else ''}"


def tags_of(runs: Sequence[RunRecord], adapter: bool, scores: bool) -> list[str]:
    stages = [str(run.recipe.get("method") or run.recipe.get("stage")) for run in runs]
    return [
        "deepseek_v2",
        *dict.fromkeys(stages),
        *(["lora"] if adapter else []),
        *([] if scores else ["conversational"]),
    ]


def _entries(run: RunRecord) -> list[str]:
    """The data entries of a recipe, as written."""
    data = run.recipe.get("data")
    entries = data if isinstance(data, list) else []
    return [str(entry.get("path", "")) for entry in entries if isinstance(entry, dict)]


def hub_datasets(runs: Sequence[RunRecord]) -> list[str]:
    named = (path.partition(":")[0] for run in runs for path in _entries(run) if on_hub(path))
    return list(dict.fromkeys(named))


def shown_run(run: RunRecord) -> dict[str, Any]:
    """What the template shows of a run."""
    manifest = run.manifest
    sources = [
        {
            "name": code_span(shareable(str(file.get("path", "")))),
            **{key: f"{file.get(key, 0):,}" for key in ("rows", "used", "left_out")},
            "sha256": code_span(str(file.get("sha256", ""))),
        }
        for file in manifest.get("data", [])
    ]
    return {
        "title": f"{_title(run)}: {run.directory.name}",
        "sources": sources,
        "lines": _run_lines(manifest),
        "recipe": dump_text(shareable(_stated(run.recipe))).strip(),
    }


def _run_lines(manifest: Mapping[str, Any]) -> list[str]:
    """Sizes, versions and final metrics of a run."""
    trained = manifest.get("trained", [])
    weights = sum(row.get("parameters", 0) for row in trained)
    parts = ", ".join(str(row.get("projection")) for row in trained)
    metrics = {key: value for key, value in manifest.get("metrics", {}).items() if isinstance(value, int | float)}
    versions = manifest.get("versions", {})
    final = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
    lines = [
        f"trained: {weights:,} weights ({parts})" if trained else "",
        f"training took {manifest.get('training_seconds', 0):,.0f} s on {manifest.get('processes', 1)} process(es), "
        f"seed {manifest.get('seed')}",
        f"at the end of training: {final}" if final else "",
        f"versions: {', '.join(f'{name} {versions[name]}' for name in PACKAGES if versions.get(name))}",
    ]
    return [line for line in lines if line]


def shown_evaluation(run: RunRecord) -> dict[str, Any]:
    """A table of an evaluation's figures with their intervals."""
    entry = figures(run.manifest.get("metrics", {}))
    rows = []
    for column in columns_of([entry], {}):
        cell = column.cell(entry)
        has_interval = cell.minor and (column.kind == SHARE or entry.get(column.key + INTERVAL))
        interval = [f"95 % interval {cell.minor[0]}"] if has_interval else []
        size = sample_size(entry, column.key)
        more = [*interval, *cell.minor[len(interval) :], *([f"n = {size:,.0f}"] if size else [])]
        rows.append({"task": column.title, "decoding": column.decoding, "value": cell.text, "more": "; ".join(more)})
    return {"heading": f"{run.directory.name}, seed {run.manifest.get('seed')}:", "rows": rows}


def eval_results_of(run: RunRecord) -> list[EvalResult]:
    """The figures of an evaluation for the hub's model index."""
    from huggingface_hub import EvalResult

    entry = figures(run.manifest.get("metrics", {}))
    results = []
    for column in columns_of([entry], {}):
        value = entry[column.key]
        if isinstance(value, int | float):
            beside = {
                "interval_95": entry.get(column.key + INTERVAL),
                "n": int(sample_size(entry, column.key) or 0) or None,
            }
            arguments = {key: stated for key, stated in beside.items() if stated is not None}
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=column.key,
                    dataset_name=column.title,
                    metric_type=column.key,
                    metric_value=value,
                    metric_args=arguments or None,
                )
            )
    return results


def _stated(recipe: Any) -> Any:
    """A recipe without the values that were left at nothing."""
    if isinstance(recipe, dict):
        kept = {key: _stated(value) for key, value in recipe.items()}
        return {key: value for key, value in kept.items() if value not in (None, {}, [])}
    return [_stated(value) for value in recipe] if isinstance(recipe, list) else recipe


def shareable(value: Any) -> Any:
    """A value without the directories of this machine: of an absolute path only the name is left."""
    if isinstance(value, dict):
        return {key: shareable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shareable(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def code_span(text: str) -> str:
    """As code in a table, with what would end it replaced."""
    return f"`{text}`".replace("|", "/").replace("\n", " ") if text else ""
