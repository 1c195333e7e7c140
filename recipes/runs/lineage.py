"""Which runs led to a model, and which evaluations measured it, read from run directories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.run_files import CHECKPOINT, FINAL, MANIFEST, RECIPE
from recipes.files import read_json
from recipes.recipe.yaml_text import read_mapping
from recipes.stages import stages

LONGEST = 32  # runs in a row


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says of itself: its recipe as resolved, and its manifest."""

    directory: Path
    recipe: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def model_path(self) -> str:
        """The model that the run started from, or evaluated."""
        model = self.recipe.get("model")
        return str(model.get("path", "")) if isinstance(model, dict) else ""


def run_of(path: str | Path) -> RunRecord | None:
    """The run that a path belongs to (its directory, final/ or checkpoint-N); None if it is no run's."""
    directory = Path(path)
    if directory.name == FINAL or directory.name.startswith(CHECKPOINT):
        directory = directory.parent
    if not (directory / RECIPE).is_file() or not (directory / MANIFEST).is_file():
        return None
    try:
        manifest = read_json(directory / MANIFEST)
        return RunRecord(directory, read_mapping(directory / RECIPE), manifest if isinstance(manifest, dict) else {})
    except (OSError, ToolkitError):  # damaged: like a directory without these files
        return None


def lineage(path: str | Path) -> tuple[str, list[RunRecord]]:
    """(the model that the first run started from, the runs from the first to that of `path`)."""
    runs: list[RunRecord] = []
    origin = str(path)
    while len(runs) < LONGEST and (run := run_of(origin)) is not None:
        runs.insert(0, run)
        origin = run.model_path
    return origin, runs


def evaluations_of(run_dir: Path) -> list[RunRecord]:
    """The finished evaluations of a run's model in the directories beside it, such as those of its chain, and inside
    these, where one recipe evaluates several models."""
    measuring = {name for name, stage in stages().items() if stage.measures}
    beside = run_dir.resolve().parent
    found = (run_of(file.parent) for depth in ("*", "*/*") for file in sorted(beside.glob(f"{depth}/{RECIPE}")))
    return [
        run
        for run in found
        if run is not None
        and run.recipe.get("stage") in measuring
        and run.manifest.get("status") == "finished"
        and _same_run(run.model_path, run_dir)
    ]


def _same_run(path: str, run_dir: Path) -> bool:
    """Whether a path in a recipe names a run's result."""
    named = run_of(path) if path else None
    return named is not None and named.directory.resolve() == run_dir.resolve() and CHECKPOINT not in Path(path).name
