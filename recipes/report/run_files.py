"""Reads run directories for the report: anything missing or broken becomes a note, never an exception."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from conversations.errors import ToolkitError
from conversations.run_files import CHECKPOINT, FINAL, MANIFEST, METRICS, RECIPE, REJECTED, RESULTS, SAMPLES
from recipes.lock import owner_of
from recipes.recipe.schema import CHAIN
from recipes.recipe.yaml_text import parse_yaml
from recipes.report.metrics import Metrics, collect
from recipes.results.titles import titles_of
from recipes.results.words import count, number
from recipes.runs.manifest import seconds_so_far
from recipes.stages import stage_written, stages

RUN_FILES = (RECIPE, MANIFEST, METRICS, SAMPLES, RESULTS)
READ = (*RUN_FILES, REJECTED)  # of a run directory
RUNNING = "running: "  # begins the status of a run that somebody works on
MAX_SAMPLES = 20_000
_NESTING = 2


@dataclass
class Run:
    """One run directory as read. `name` is unique on the page; `notes` say what is missing or broken."""

    path: Path
    name: str
    kind: str = "unknown"
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    samples: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def is_chain(self) -> bool:
        return self.kind == CHAIN

    @property
    def is_running(self) -> bool:
        return str(self.manifest.get("status")).startswith(RUNNING)

    @property
    def is_summary(self) -> bool:
        """Whether its results are those of the runs inside it: a chain, or an evaluation of several models."""
        return self.is_chain or bool(self.recipe.get("models"))


def open_runs(path: Path) -> list[Run]:
    """The run at `path`, if it is one, and the runs inside it (a chain's stages) in the order of their chain.

    Raises:
        ToolkitError: `path` is not a directory, or no run is in it or below it.
    """
    places = run_places(path)
    names = {at: at.relative_to(path).as_posix() if at != path else directory_name(path) for at in places}
    runs = [read_run(at, name) for at, name in names.items()]
    for run in runs:
        _note_missing(run)
    for chain in runs:
        if chain.is_chain and chain.manifest.get("status") != "finished":
            stages = [run.manifest.get("seconds") for run in runs if run.path.parent == chain.path]
            chain.manifest["seconds"] = sum(seconds for seconds in map(number, stages) if seconds is not None)
    orders = {run.path: [*titles_of(run.recipe).stages] for run in runs if run.is_summary}

    def place(run: Run) -> tuple[str, bool, int, str]:
        home = next((at for at in (run.path, *run.path.parents) if at in orders), path)
        order = orders.get(home, [])
        rank = order.index(run.path.name) if run.path.name in order else len(order)
        return str(home), run.path != home, rank, run.name

    return sorted(runs, key=place)


def run_places(path: Path) -> list[Path]:
    """The directories of the runs at and below `path`.

    Raises:
        ToolkitError: as `open_runs`.
    """
    if not path.is_dir():
        raise ToolkitError(f"{path}: no such directory; pass the output_dir of a stage or of a chain")
    places = [path] if _looks_like_run(path) else []
    places += _inner_runs(path, _NESTING)
    if not places:
        raise ToolkitError(
            f"{path}: not a run directory (none of {', '.join(RUN_FILES)} in it or below it); "
            "pass the output_dir of a stage or of a chain"
        )
    return places


def directory_name(path: Path) -> str:
    """The directory's own name, even for `.` and similar paths."""
    return path.resolve().name or str(path)


def read_run(path: Path, name: str) -> Run:
    """Read one run directory; any file may be missing."""
    run = Run(path, name)
    run.recipe_text = _read_text(path / RECIPE)
    run.recipe = _parse_recipe(run)
    run.manifest = _read_json(path / MANIFEST, run.notes)
    run.manifest |= _how_it_stands(run)
    run.results = _read_json(path / RESULTS, run.notes)
    _note_odd_results(run)
    read = partial(_read_lines, notes=run.notes, growing=run.is_running)
    run.metrics = collect(read(path / METRICS), run.notes)
    run.samples = _keep_ends(list(read(path / SAMPLES)), run.notes)
    rejected = read(path / REJECTED)
    run.rejected = Counter(str(row.get("reason", "no reason given")) for row in rejected)
    run.kind = _kind(run)
    return run


def _how_it_stands(run: Run) -> dict[str, Any]:
    """Status and seconds of a run whose manifest says "running": it is still running, or it was killed."""
    if run.manifest.get("status") != "running":
        return {}
    owner = owner_of(run.path)
    killed = "stopped: it was killed, or its machine went down; the same command resumes it"
    seconds = seconds_so_far(run.path, run.manifest)
    return {"status": f"{RUNNING}{owner}" if owner else killed, "seconds": seconds}


def _looks_like_run(path: Path) -> bool:
    return any((path / name).is_file() for name in RUN_FILES)


def _inner_runs(path: Path, depth: int) -> Iterator[Path]:
    if depth == 0:
        return
    for child in sorted(path.iterdir()):
        if not child.is_dir() or child.name == FINAL:
            continue
        if child.name.startswith((".", CHECKPOINT)):
            continue
        if _looks_like_run(child):
            yield child
        yield from _inner_runs(child, depth - 1)


def _kind(run: Run) -> str:
    stated = run.recipe.get("stage")
    if isinstance(stated, str):
        return stated
    if isinstance(run.results.get("stages"), dict):
        return CHAIN
    logged = run.metrics.series.keys()
    likely = [stage.name for stage in stages().values() if not logged.isdisjoint(stage.signs)]
    return likely[-1] if likely else "unknown"  # all log a loss, which is the sign of the first


def _note_odd_results(run: Run) -> None:
    """Adds a note for each entry of results.json that no table can show."""
    for section in ("stages", "reward_models"):
        entries = run.results.get(section, {})
        if not isinstance(entries, dict):
            run.notes.append(f"{RESULTS}: {section} is not an object")
            continue
        run.notes += [
            f"{RESULTS}: {section}.{k} is not an object" for k, v in entries.items() if not isinstance(v, dict)
        ]


def _expected(run: Run) -> tuple[str, ...]:
    """The files of a finished run; `final` is a directory."""
    always, stage = (RECIPE, MANIFEST), stage_written({**run.recipe, "stage": run.kind})
    if run.is_summary:
        return (*always, RESULTS)
    if stage is None:
        return (*always, METRICS)
    return (*always, *stage.writes, *([] if stage.measures else [stage.result]))


def _note_missing(run: Run) -> None:
    if run.is_running:  # they come
        return
    for name in _expected(run):
        if (run.path / name).exists():
            continue
        unfinished = ": the run has not finished" if name in (FINAL, RESULTS) else ""
        run.notes.append(f"{name} is missing{unfinished}")


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parse_recipe(run: Run) -> dict[str, Any]:
    try:
        parsed = parse_yaml(run.recipe_text, RECIPE)
    except ToolkitError as error:
        run.notes.append(str(error))
        return {}
    if parsed is not None and not isinstance(parsed, dict):
        run.notes.append(f"{RECIPE} holds a {type(parsed).__name__}, not a mapping")
    return parsed if isinstance(parsed, dict) else {}


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(parsed, dict):
        notes.append(f"{path.name} holds a {type(parsed).__name__}, not an object")
        return {}
    return parsed


def _read_lines(path: Path, notes: list[str], growing: bool) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. What cannot be read is counted in one note; not the last line of a file that is
    `growing`, which may be half written."""
    if not path.is_file():
        return
    broken: list[int] = []
    with path.open("rb") as lines:
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _read_object(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            elif not growing or line.endswith(b"\n"):
                broken.append(line_number)
    if broken:
        where = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        noun = "line" if len(broken) == 1 else "lines"
        notes.append(f"{count(len(broken), 'unreadable line')} in {path.name} ({noun} {where})")


def _read_object(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except ValueError:  # which numbers beyond 64 bits are to it, and NaN
        return json.loads(line.decode("utf-8"))


def _keep_ends(samples: list[dict[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """At most MAX_SAMPLES samples, half from each end, so that the page of a long RL run stays usable."""
    if len(samples) <= MAX_SAMPLES:
        return samples
    half = MAX_SAMPLES // 2
    notes.append(f"{SAMPLES}: only the first and last {half:,} of {len(samples):,} are read")
    return samples[:half] + samples[-half:]
