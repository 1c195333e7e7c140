"""From an installed wheel, in a folder without the sources: shipped recipes are there by name, and the demo runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsv2_start
from recipes.cli import main
from recipes.files import read_json
from recipes.recipe.loader import load_recipe
from recipes.recipe.shipped import shipped_recipes
from recipes.recipe.yaml_text import read_mapping

from ..helpers.chain_launch import smoke

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in dsv2_start.PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dsv2_start.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = f"import setuptools.build_meta as b; b.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    shutil.unpack_archive(found, folder / "site", "zip")
    return folder / "site"


def installed(wheel: Path, folder: Path, *words: str) -> str:
    """What a command of the wheel prints, started in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    command = [sys.executable, "-P", "-m", "dsv2_start", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_runs_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    assert "tiny/chain " in installed(wheel, tmp_path, "recipes")
    installed(wheel, tmp_path, "recipes", "copy", "tiny/chain", "my/chain.yaml")
    said = installed(wheel, tmp_path, "run", "my/chain.yaml", *smoke(), "output_dir=demo")
    assert said.rstrip().endswith("demo/results.json")
    assert read_json(tmp_path / "demo" / "manifest.json")["status"] == "finished"
    assert (tmp_path / "demo" / "rl_preference" / "final").is_dir()


def test_recipes_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(len(line.split()) > 4 and not line.endswith(".") for line in lines)


def test_a_name_is_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = ROOT / "recipes" / "v2_lite" / "sft_lora.yaml"
    for name in ("v2_lite/sft_lora", "v2_lite/sft_lora.yaml", "recipes/v2_lite/sft_lora.yaml"):
        assert load_recipe(Path(name)).recipe == load_recipe(path).recipe


def test_files_of_a_named_recipe_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = load_recipe(Path("v2_lite/reward_safety")).recipe.data
    assert [entry.path for entry in data] == [str(tmp_path / "data" / "harmless-base" / "train.jsonl.gz")]
    stages = load_recipe(Path("v2_lite/chain")).recipe.stages
    assert {stage.recipe for stage in stages} >= {"v2_lite/sft_lora", "v2_lite/rl_preference"}


def test_a_file_here_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "tiny/sft", "tiny/sft.yaml"]) == 0
    mine = Path("tiny/sft.yaml")
    mine.write_text(mine.read_text().replace("max_steps: 700", "max_steps: 7"))
    assert load_recipe(mine).recipe.training["max_steps"] == 7
    assert load_recipe(Path("tiny/sft")).recipe.training["max_steps"] == 700


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_a_copy_is_the_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", name, "mine/copy.yaml"]) == 0
    text = Path("mine/copy.yaml").read_text()
    assert "# Run:" in text and "mine/copy.yaml" in text and f"recipes/{name}" not in text
    copied, shipped = read_mapping(Path("mine/copy.yaml")), read_mapping(shipped_recipes()[name])
    assert {**copied, "stages": 0} == {**shipped, "stages": 0}
    assert load_recipe(Path("mine/copy.yaml"), smoke=True).recipe.stage == shipped["stage"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "v2_lite/sft_lor"], "no such recipe: v2_lite/sft_lor; did you mean v2_lite/sft_lora?"),
        (["sft", "nowhere.yaml"], "no such recipe: nowhere.yaml; `dsv2 recipes` lists those"),
        (["recipes", "copy", "v2/sft_lor", "a.yaml"], "no such recipe: v2/sft_lor; did you mean v2/sft_lora?"),
        (["recipes", "copy", "tiny/sft"], "usage: dsv2 recipes, or dsv2 recipes copy NAME FILE"),
        (["recipes", "list"], "usage: dsv2 recipes, or dsv2 recipes copy NAME FILE"),
        (["recipes", "copy", "tiny/sft", "there.yaml"], "there.yaml exists already; choose another file"),
    ],
)
def test_wrong_names(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("mine\n")
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert Path("there.yaml").read_text() == "mine\n" and not Path("a.yaml").exists()
