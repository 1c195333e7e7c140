"""`dsv2 check` says ok exactly where the run starts, and whatever is refused is one message with exit code 2.

`DSV2_WIDE=1` tries every broken recipe of tests/helpers/broken_recipes.py (some thousands, an hour) and not a sample.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from recipes.cli import main
from recipes.stages import stages

from ..helpers.broken_recipes import COMMAND, RECIPES, Path_, broken, junk_cases, make_world, special_cases

WIDE = bool(os.environ.get("DSV2_WIDE"))
Case = tuple[str, dict[Path_, Any]]
# What check once said ok to, or ended with a traceback.
KNOWN: list[Case] = [
    ("rl", {("output_dir",): "a\0b"}),
    ("rl", {("data", 0, "path"): "bare.jsonl", ("rewards",): [{"rule": "number"}, {"rule": "format"}]}),
    ("rl_model", {("model", "config"): {"num_hidden_layers": 1}}),
    ("sft", {("data", 0, "columns"): {"prompt": "absent"}}),
    ("sft_full", {("output_dir",): "folder"}),
    ("sft_full", {("output_dir",): "runs/sft"}),
    ("eval", {("tasks", 0, "patterns"): ["["]}),
    ("eval_reward", {("model", "config"): {"hidden_size": 8}}),
    ("eval_reward", {("tasks", 0, "data", 0, "path"): "judged.jsonl"}),
    ("sft", {("training", "per_device_eval_batch_size"): 10**30}),
    ("chain", {("compare",): [{"name": "a", "before": "eval_sft", "after": "eval_sft", "task": "absent"}]}),
]


def sample() -> list[Case]:
    special, junk = list(special_cases()), list(junk_cases())
    if WIDE:
        return [*KNOWN, *special, *junk]
    rng = random.Random(11)
    return [*KNOWN, *rng.sample(special, 14), *rng.sample(junk, 16)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("sft", "reward"):
            path = folder / f"{name}.yaml"
            path.write_text(json.dumps({**RECIPES[name], "output_dir": f"runs/{name}"}))
            assert main([name, str(path)]) == 0
    return folder


@pytest.fixture
def exit_code_of(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """exit_code_of(command, recipe) checks that the message is one of ours and returns the exit code."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("sft.stage.SAMPLE_TOKENS", 2)

    def run(command: str, recipe: dict[str, Any]) -> int:
        for path in [*world.glob("out*"), *world.glob(".out*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        Path("case.yaml").write_text(json.dumps(recipe))
        capsys.readouterr()
        code = main([command, "case.yaml"])
        said = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in said, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code == 2), said
        return code

    return run


@pytest.mark.parametrize("kind", RECIPES)
def test_a_whole_recipe_runs(exit_code_of: Any, kind: str) -> None:
    recipe = RECIPES[kind]
    assert exit_code_of("check", recipe) == exit_code_of(COMMAND.get(recipe["stage"], recipe["stage"]), recipe) == 0


@pytest.mark.parametrize(("kind", "changes"), sample(), ids=lambda value: str(value)[:80])
def test_check_is_right(exit_code_of: Any, kind: str, changes: dict[Path_, Any]) -> None:
    """What check refuses the run refuses too, by the same code; what it lets pass must run."""
    recipe = broken(RECIPES[kind], changes)
    stage = recipe.get("stage")
    command = COMMAND.get(stage, stage) if stage in (*COMMAND, *stages()) else "sft"
    checked = exit_code_of("check", recipe)
    if checked == 0 or not WIDE:
        assert exit_code_of(command, recipe) == checked
