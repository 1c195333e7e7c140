"""manifest.json: how a run was made (command, versions, code, data, seeds) and how it ended."""

import hashlib
import os
import platform
import subprocess
import sys
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conversations.run_files import CHAIN_STATE, CHECKPOINT, FINAL, MANIFEST, RESULTS
from recipes.files import read_json, write_json
from recipes.processes import command_line, is_main, now, world_size

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
_HOME = Path(__file__).resolve().parents[2]
_WRITTEN = (MANIFEST, RESULTS, "*.jsonl", CHAIN_STATE, f"{CHECKPOINT}*", FINAL)  # what a run writes as it goes


def new_manifest(recipe_file: Path, seed: int) -> dict[str, Any]:
    """The manifest at the start of a run; `status` is "running" until it ends."""
    return {
        "status": "running",
        "command": command_line(),
        "recipe": str(recipe_file.absolute()),
        "started": now(),
        "seed": seed,
        "processes": world_size(),
        "versions": versions(),
        "code": code_state(),
        "data": [],
        "seconds": 0.0,
        "training_seconds": 0.0,
        "peak_memory_gb": 0.0,
        "metrics": {},
    }


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest of a run; empty if there is none."""
    manifest = read_json(run_dir / MANIFEST)
    return manifest if isinstance(manifest, dict) else {}


def write_manifest(run_dir: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, from the main process only."""
    if is_main():
        write_json(run_dir / MANIFEST, manifest)


def seconds_so_far(run_dir: Path, manifest: dict[str, Any]) -> float:
    """Seconds spent in a run: those counted in its manifest and, if that still says "running", the time from its last
    start to its last written file."""
    counted = manifest.get("seconds")
    counted = counted if isinstance(counted, int | float) else 0.0
    start = _last_start(manifest)
    if manifest.get("status") != "running" or start is None:
        return counted
    write_times = [path.stat().st_mtime for pattern in _WRITTEN for path in run_dir.glob(pattern)]
    return counted + max(0.0, max(write_times, default=start) - start)


def _last_start(manifest: dict[str, Any]) -> float | None:
    """The time of the last start or resume, in seconds; None if the manifest has none."""
    resumed = manifest.get("resumed")
    last = resumed[-1] if isinstance(resumed, list) and resumed else None
    try:
        text = last["at"] if last else manifest["started"]
        return datetime.fromisoformat(text).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None


@cache
def versions() -> dict[str, str | None]:
    """Installed versions of the libraries used for training; None for a package that is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


@cache
def code_state() -> dict[str, str | None]:
    """Commit of the toolkit and a hash of uncommitted changes; None if it is not in its own repository (a virtual
    environment may be inside another project's)."""
    top = _git("rev-parse", "--show-toplevel")
    is_own_repository = (
        top is not None and Path(top.rstrip("\n")).resolve() == _HOME and _git("ls-files", "--error-unmatch", __file__)
    )
    commit = _git("rev-parse", "HEAD") if is_own_repository else None
    diff = _git("diff", "--no-ext-diff", "HEAD") if commit else None
    return {
        "commit": commit.strip() if commit else None,
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
    }


def peak_memory_gb() -> float:
    """Peak memory of this process or one of its children, in GB; 0 if the system does not report it."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit / 1e9


def _git(*arguments: str) -> str | None:
    try:
        process = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")},  # from hooks
            capture_output=True, text=True, errors="replace", timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout
