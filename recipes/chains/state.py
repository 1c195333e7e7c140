"""chain.json: which stages of a chain have run, what they cost, and fingerprints of their inputs."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.run_files import CHAIN_STATE
from conversations.sections import StageRecipe
from recipes.data.sources import source_hash
from recipes.files import file_sha256, read_json, write_json
from recipes.processes import is_main
from recipes.recipe.loader import Loaded
from recipes.runs.model_card import CARD

_SMALL = 1 << 20


class ChainState:
    """The entries of the stages, each {fingerprint, status, seconds, training_seconds, peak_memory_gb, metrics}."""

    def __init__(self, file: Path, stages: dict[str, dict[str, Any]]):
        self.file = file
        self.stages = stages

    @classmethod
    def read(cls, output: Path) -> "ChainState":
        """Read the state of a chain's directory; empty if there is none."""
        content = read_json(output / CHAIN_STATE)
        stages = content.get("stages") if isinstance(content, dict) else None
        valid = isinstance(stages, dict) and all(
            isinstance(entry, dict) and {"fingerprint", "status", "metrics"} <= entry.keys()
            for entry in stages.values()
        )
        if content is not None and not valid:
            raise ToolkitError(f"{output / CHAIN_STATE}: stages is damaged; put the file back, or move it away")
        return cls(output / CHAIN_STATE, stages or {})

    def begin(self, name: str, fingerprint: str) -> None:
        """Record that a stage starts or resumes."""
        self.stages[name] = {"fingerprint": fingerprint, "status": "running", "metrics": {}}
        self.count(name, {})

    def count(self, name: str, manifest: Mapping[str, Any]) -> None:
        """Record what a stage has cost so far, from its manifest."""
        for key in ("seconds", "training_seconds", "peak_memory_gb"):
            self.stages[name][key] = manifest.get(key, 0.0)
        self._write()

    def finish(self, name: str, manifest: Mapping[str, Any]) -> None:
        """Record that a stage has finished successfully."""
        self.stages[name] |= {"status": "finished", "metrics": manifest["metrics"]}
        self.count(name, manifest)

    def seconds(self, names: Iterable[str]) -> float:
        """Total seconds spent in these stages, including interrupted runs."""
        return sum(self.stages[name]["seconds"] for name in names)

    def peak_memory_gb(self, names: Iterable[str]) -> float:
        """Highest peak memory of these stages, in GB."""
        return max(self.stages[name]["peak_memory_gb"] for name in names)

    def _write(self) -> None:
        if is_main():
            write_json(self.file, {"stages": self.stages})


def fingerprint(stage: Loaded[StageRecipe], used: Mapping[str, str]) -> str:
    """A hash of everything that a stage's result depends on.

    Args:
        stage: the stage's resolved recipe, hashed together with its data files and the models from outside the chain.
        used: fingerprints of the stages of the chain that it refers to, by run directory.
    """
    recipe = stage.recipe
    paths = [recipe.model.path, *(other.path for other in recipe.other_models())]
    outside = [path for path in paths if not any(Path(path).is_relative_to(run_dir) for run_dir in used)]
    content = {
        "recipe": stage.resolved,
        "stages": dict(used),
        "data": _data_hashes(recipe),
        "models": {path: _model_hash(Path(path)) for path in outside},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _data_hashes(recipe: StageRecipe) -> list[str]:
    """Hashes of all data entries; generated data sets are created if missing."""
    return [
        source_hash(entry, recipe.seed, f"{key}.{index}")
        for key, entries in {rows.key: rows.entries for rows in recipe.row_lists()}.items()
        for index, entry in enumerate(entries)
    ]


def _model_hash(path: Path) -> dict[str, Any]:
    """Identifies small files by content, large ones by size and modification time; empty for a hub name. Model cards
    are left out: an evaluation writes its figures into them."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != CARD) if path.is_dir() else []
    return {
        str(file.relative_to(path)): file_sha256(file)
        if (stat := file.stat()).st_size <= _SMALL
        else [stat.st_size, stat.st_mtime_ns]
        for file in files
    }
