"""chain.json: which stages of a chain were run and what they cost; fingerprints of what their results depend on."""

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

_SMALL = 1 << 20


class ChainState:
    """The stages' entries: {fingerprint, status, seconds, training_seconds, peak_memory_gb, metrics}."""

    def __init__(self, file: Path, stages: dict[str, dict[str, Any]]):
        self.file = file
        self.stages = stages

    @classmethod
    def read(cls, output: Path) -> "ChainState":
        """The state of a chain's directory; empty when there is none."""
        content = read_json(output / CHAIN_STATE)
        stages = content.get("stages") if isinstance(content, dict) else None
        whole = isinstance(stages, dict) and all(
            isinstance(entry, dict) and {"fingerprint", "status", "metrics"} <= entry.keys()
            for entry in stages.values()
        )
        if content is not None and not whole:
            raise ToolkitError(f"{output / CHAIN_STATE}: stages is damaged; put the file back, or move it away")
        return cls(output / CHAIN_STATE, stages or {})

    def begin(self, name: str, fingerprint: str) -> None:
        """A stage that starts or resumes."""
        self.stages[name] = {"fingerprint": fingerprint, "status": "running", "metrics": {}}
        self.count(name, {})

    def count(self, name: str, manifest: Mapping[str, Any]) -> None:
        """What a stage has cost so far, by its manifest."""
        for key in ("seconds", "training_seconds", "peak_memory_gb"):
            self.stages[name][key] = manifest.get(key, 0.0)
        self._write()

    def finish(self, name: str, manifest: Mapping[str, Any]) -> None:
        """A stage that has ended well."""
        self.stages[name] |= {"status": "finished", "metrics": manifest["metrics"]}
        self.count(name, manifest)

    def seconds(self, names: Iterable[str]) -> float:
        """Seconds of work in these stages, interrupted runs included."""
        return sum(self.stages[name]["seconds"] for name in names)

    def peak_memory_gb(self, names: Iterable[str]) -> float:
        """Most memory that any of these stages held."""
        return max(self.stages[name]["peak_memory_gb"] for name in names)

    def _write(self) -> None:
        if is_main():
            write_json(self.file, {"stages": self.stages})


def fingerprint(stage: Loaded[StageRecipe], used: Mapping[str, str]) -> str:
    """A hash of all that a stage's result depends on.

    Args:
        stage: the stage's resolved recipe: hashed with the data files and models outside the chain that it names.
        used: fingerprints of the chain's stages that it names, by their run directories.
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
    """Those of all data entries; generated ones are made."""
    return [
        source_hash(entry, recipe.seed, f"{key}.{index}")
        for key, entries in {each.key: each.entries for each in recipe.row_lists()}.items()
        for index, entry in enumerate(entries)
    ]


def _model_hash(path: Path) -> dict[str, Any]:
    """Small files by their bytes, large ones by size and time; empty for a hub name."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    return {
        str(file.relative_to(path)): file_sha256(file)
        if (about := file.stat()).st_size <= _SMALL
        else [about.st_size, about.st_mtime_ns]
        for file in files
    }
