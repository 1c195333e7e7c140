"""Commands that write where nothing can be written: one line, exit code 2, and nothing left anywhere."""

import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.cli import main

from ..helpers.broken_recipes import RECIPES, make_world

NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS: mounts that only this process sees
STAGES = {"sft": "sft", "reward": "reward", "rl": "rl", "eval": "eval", "pairs": "pairs", "run": "chain"}
# Everything that writes; `sealed` cannot be written, and holds an empty folder, a run and a file of its own.
REFUSED: dict[str, list[str]] = {
    "init": ["init", "sealed/new", "--preset", "tiny"],
    "init, deep": ["init", "sealed/a/b/new", "--preset", "tiny"],
    "init, empty": ["init", "sealed/empty", "--preset", "tiny"],
    **{name: [name, f"{kind}.yaml", "output_dir=sealed/new"] for name, kind in STAGES.items()},
    **{f"{name}, deep": [name, f"{kind}.yaml", "output_dir=sealed/a/b"] for name, kind in STAGES.items()},
    **{f"{name}, empty": [name, f"{kind}.yaml", "output_dir=sealed/empty"] for name, kind in STAGES.items()},
    "sft --smoke": ["sft", "sft.yaml", "--smoke", "output_dir=sealed/new"],
    "sft, itself": ["sft", "sft.yaml", "output_dir=sealed"],
    "sft, resumed": ["sft", "sft.yaml", "output_dir=sealed/stopped"],
    "sft, missing model": ["sft", "sft.yaml", "output_dir=out", "model={path: sealed/model, preset: tiny}"],
    "check": ["check", "sft.yaml", "output_dir=sealed/new"],
    "check, chain": ["check", "chain.yaml", "output_dir=sealed/new"],
    "merge": ["merge", "sealed/run", "sealed/new"],
    "export": ["export", "sealed/run", "sealed/new", "--layout", "per_expert"],
    "import": ["import", "sealed/run/final", "sealed/new"],
    "experts": ["experts", "sft.yaml", "--output", "sealed/new.json"],
    "report": ["report", "sealed/run"],
    "report, elsewhere": ["report", "sealed/run", "--output", "sealed/a/page.html"],
    "recipes copy": ["recipes", "copy", "tiny/sft", "sealed/a/new.yaml"],
    "a file for a folder": ["sft", "sft.yaml", "output_dir=sealed/notes.txt/run"],
}
# What only reads there, the data too.
ALLOWED: dict[str, list[str]] = {
    "finished": ["sft", "sft.yaml", "output_dir=sealed/run"],
    "chat": ["chat", "sealed/run", "--prompt", "1 + 1", "--max-new-tokens", "2"],
    "eval": ["eval", "eval.yaml", "model.path=sealed/run", "output_dir=out"],
    "merge": ["merge", "sealed/run", "out"],
    "report": ["report", "sealed/run", "--output", "out.html"],
}
# Where no temporary directory can be written either, as on a full disk.
NO_TEMPORARY: dict[str, tuple[int, list[str]]] = {
    "recipes": (0, ["recipes"]),
    "check": (2, ["check", "sft.yaml", "output_dir=out"]),
    "sft": (2, ["sft", "sft.yaml", "output_dir=out"]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model, recipes, and a finished and a stopped run in `sealed`."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    for kind in (*STAGES.values(), "sft_full"):
        (folder / f"{kind}.yaml").write_text(json.dumps(RECIPES[kind]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["sft", "sft.yaml", "output_dir=sealed/run"]) == 0
    sealed = folder / "sealed"
    (sealed / "empty").mkdir()
    (sealed / "notes.txt").write_text("mine")
    shutil.copytree(sealed / "run", sealed / "stopped", ignore=lambda *_: {"final"})
    recipe = sealed / "stopped" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("sealed/run", "sealed/stopped"))
    return folder


def mounted_read_only(folder: Path) -> None:
    """For this process alone. Raises OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_NAMESPACE):
        raise OSError(ctypes.get_errno(), "no mount namespace of its own")
    for options in ("bind", "remount,bind,ro"):
        words = ["mount", "--make-private", "-o", options, str(folder), str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr)


def without_rights(folder: Path) -> None:
    """As a user who may not write there; root first gives up the capabilities that let it write anywhere."""
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        path.chmod(0o555)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def run_all(seal: Callable[[Path], None], world: Path) -> Any:
    """{command: [exit code, what it printed to stderr, the files that are new or gone]}; or why it cannot be tried."""
    os.chdir(world)
    try:
        seal(world / "sealed")
    except OSError as error:
        return str(error)
    found = {name: outcome(words) for name, words in REFUSED.items()}
    found |= {f"allowed: {name}": outcome(words) for name, words in ALLOWED.items()}
    tempfile.tempdir, tempfile._candidate_tempdir_list = None, lambda: [str(world / "sealed")]  # pyright: ignore
    return found | {f"no temporary: {name}": outcome(words) for name, (_, words) in NO_TEMPORARY.items()}


def outcome(words: list[str]) -> tuple[int, str, list[str]]:
    before, error = set(map(str, Path().rglob("*"))), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    after = set(map(str, Path().rglob("*")))
    for path in Path().glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return code, error.getvalue(), sorted(before ^ after)


def in_new_process(seal: Callable[[Path], None], world: Path, answer: Path) -> Any:
    """What `run_all` returns in a process of its own; not in a fork, where the threads of torch would be missing."""
    process = multiprocessing.get_context("spawn").Process(target=write_outcomes, args=(seal, world, answer))
    process.start()
    process.join(timeout=300)
    process.kill()
    return json.loads(answer.read_text(encoding="utf-8"))


def write_outcomes(seal: Callable[[Path], None], world: Path, answer: Path) -> None:
    answer.write_text(json.dumps(run_all(seal, world)), encoding="utf-8")


@pytest.mark.parametrize("seal", [mounted_read_only, without_rights], ids=lambda seal: seal.__name__)
def test_a_place_that_cannot_be_written(world: Path, seal: Callable[[Path], None], tmp_path: Path) -> None:
    found = in_new_process(seal, world, tmp_path / "answer.json")
    if isinstance(found, str):
        pytest.skip(f"not allowed here: {found}")
    for name in REFUSED:
        code, error, changed = found[name]
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, (name, code, error)
        assert "sealed" in error and "free some space" not in error and not changed, (name, error, changed)
    for name in ALLOWED:
        code, error, _ = found[f"allowed: {name}"]
        assert code == 0 and "Traceback" not in error, (name, code, error)
    for name, (wanted, _) in NO_TEMPORARY.items():
        code, error, changed = found[f"no temporary: {name}"]
        assert code == wanted and error.count("\n") == (wanted == 2), (name, code, error)
        assert wanted == 0 or ("TMPDIR" in error and not changed), (name, error, changed)
