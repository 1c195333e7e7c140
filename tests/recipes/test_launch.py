"""The command line starts, whatever files and packages with the names of its own lie around."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsv2_start
from recipes.cli import main
from recipes.runs import manifest

DSV2 = Path(sys.executable).with_name("dsv2")
SFT = str(Path(__file__).parents[2] / "recipes" / "tiny" / "sft.yaml")
CHECK = ["check", SFT, "training.lerning_rate=1"]  # reads the recipe with the stage's own config, then stops


def foreign(folder: Path) -> None:
    """Files of the toolkit's names; none of them can be imported."""
    for name in ("conversations", "eval", "reward", "rl", "sft"):
        (folder / f"{name}.py").write_text("raise SystemError('not ours')\n")
    for name in ("recipes", "deepseek_v2_modeling"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemError('not ours')\n")


def start(words: list[str], folder: Path, path: str = "") -> tuple[int, str]:
    """Exit code and output of a command in a folder."""
    environment = {**os.environ, "PYTHONPATH": path, "PATH": f"{DSV2.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("launch", "path"),
    [
        ([str(DSV2)], "."),
        ([sys.executable, "-m", "dsv2_start"], ""),  # the working directory comes first
    ],
)
def test_foreign_files_are_not_imported(launch: list[str], path: str, tmp_path: Path) -> None:
    foreign(tmp_path)
    code, said = start([*launch, *CHECK], tmp_path, path)
    assert code == 2 and "lerning_rate" in said and said.count("\n") == 1, said


def test_recipes_cli_as_a_module_is_not_harmed_by_files_of_other_names(tmp_path: Path) -> None:
    """Some editable installations find a folder `recipes` without __init__.py first; that is said in one line. (A
    package `recipes` in the working directory is imported before anything of ours: Python's own error.)"""
    foreign(tmp_path)
    shutil.rmtree(tmp_path / "recipes")
    launch = [sys.executable, "-m", "recipes.cli", *CHECK]
    code, said = start(launch, tmp_path)
    assert code == 2 and "lerning_rate" in said and said.count("\n") == 1, said
    (tmp_path / "recipes").mkdir()
    code, said = start([*launch[:3], "--version"], tmp_path)
    assert code == 0 or (code, said.count("\n")) == (2, 1), said
    assert code == 0 or said.startswith(f"error: {tmp_path / 'recipes'} shadows"), said


def test_torchrun_is_not_harmed(tmp_path: Path) -> None:
    foreign(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--standalone", "--nproc-per-node", "2"]
    code, said = start([*torchrun, "dsv2", "--version"], tmp_path)
    assert code == 0 and said.count("0.1.0") == 2, said


def test_a_package_that_was_overwritten_is_named(tmp_path: Path) -> None:
    """Another distribution with a package `recipes` was installed into the same directory."""
    for name in dsv2_start.PACKAGES:
        shutil.copytree(dsv2_start.HOME / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(dsv2_start.__file__, tmp_path)
    (tmp_path / "recipes" / "cli.py").unlink()
    # -S: an editable installation would find what was overwritten
    code, said = start([sys.executable, "-S", "-m", "dsv2_start", "--version"], tmp_path)
    assert code == 2 and said.startswith(f"error: {tmp_path / 'recipes'} is no longer the toolkit's own"), said


def test_a_module_that_cannot_be_moved_aside_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reward", pytest)
    message = dsv2_start.in_the_way()
    assert message and str(pytest.__file__) in message and '"reward"' in message


@pytest.mark.parametrize(
    ("words", "variable", "shown"),
    [
        ([], None, False),
        ([], "0", False),
        ([], "1", True),
        (["--traceback"], None, True),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_tracebacks_are_shown_on_demand(
    words: list[str],
    variable: str | None,
    shown: bool,
    first: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("DSV2_TRACEBACK", raising=False)
    if variable is not None:
        monkeypatch.setenv("DSV2_TRACEBACK", variable)
    assert main([*words, *CHECK] if first else [*CHECK, *words]) == 2
    said = capsys.readouterr().err
    assert ("Traceback (most recent call last)" in said) is shown
    assert said.splitlines()[-1].startswith("error: ") and "lerning_rate" in said.splitlines()[-1]


def git(folder: Path, *words: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", *name, *words], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def installed(folder: Path) -> dict[str, str | None]:
    """What a manifest would say of the code if the toolkit were installed in a folder."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "recipes" / "manifest.py").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "__file__", str(folder / "recipes" / "manifest.py"))
        patch.setattr(manifest, "_HOME", folder)
        return manifest.code_state.__wrapped__()


def test_a_manifest_has_the_commit_of_the_toolkit_alone(tmp_path: Path) -> None:
    nothing = {"commit": None, "diff_sha256": None}
    git(tmp_path, "init", "-q")
    site = tmp_path / ".venv" / "lib" / "site-packages"
    assert installed(site) == nothing
    git(tmp_path, "add", "--force", "--all")  # even if the environment is part of the project
    git(tmp_path, "commit", "-q", "-m", "mine")
    assert installed(site) == nothing
    own = tmp_path / "toolkit"
    own.mkdir()
    git(own, "init", "-q")
    assert installed(own) == nothing  # not added yet
    git(own, "add", "--all")
    git(own, "commit", "-q", "-m", "ours")
    assert installed(own) == {"commit": git(own, "rev-parse", "HEAD"), "diff_sha256": None}
    (own / "recipes" / "other.py").write_text("x = 1\n")
    git(own, "add", "--all")
    assert installed(own)["diff_sha256"]
