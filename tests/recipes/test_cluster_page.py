"""docs/cluster.md: its scripts parse, its commands are ours, and its sizes fit its recipes."""

import argparse
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_v2_modeling.training import Parallel
from recipes import cli
from recipes.plan.layouts import USABLE
from recipes.plan.load import Lengths, known_settings, load_of
from recipes.plan.memory import Layout, memory
from recipes.recipe.loader import load_recipe
from recipes.runs.foundation import find_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
# What a cluster puts into the variables of the scripts.
VALUES = {
    "$SLURM_NNODES": "2", "$SKYPILOT_NUM_NODES": "2", "$SKYPILOT_NUM_GPUS_PER_NODE": "8", "$head": "10.0.0.1",
}  # fmt: skip
SBATCH = re.compile(
    r"#SBATCH --(?:requeue|(?:job-name|nodes|ntasks-per-node|gpus-per-node|cpus-per-task|time|output|open-mode)=\S+)"
)


def scripts() -> list[str]:
    """All shell scripts of the page, those inside of YAML too."""
    found = [text for kind, text in BLOCKS if kind == "bash"]
    for kind, text in BLOCKS:
        found += [yaml.safe_load(text)[key] for key in ("setup", "run") if kind == "yaml"]
    return found


def our_commands() -> list[list[str]]:
    """The words of every `dsv2` command, with the values of variables."""
    lines = [line for script in scripts() for line in script.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if "dsv2 " in line]
    return [[_with_values(word) for word in line[line.index("dsv2") + 1 :]] for line in words]


def _with_values(word: str) -> str:
    for name, value in VALUES.items():
        word = word.replace(name, value)
    return word


@pytest.mark.parametrize("script", scripts())
def test_a_script_parses(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert all(SBATCH.fullmatch(line) for line in lines)
    assert ("srun" in script) == bool(lines)


def test_the_task_of_skypilot_has_its_fields() -> None:
    (task,) = (yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml")
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
    assert re.fullmatch(r"[A-Z]+\d+:8", task["resources"]["accelerators"]) and task["num_nodes"] == 2


@pytest.mark.parametrize("words", our_commands(), ids=" ".join)
def test_a_command_is_ours(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "launch", lambda arguments, _: seen.append(arguments) or 0)
    commands = {name: replace(command, run=lambda a: seen.append(a) or 0) for name, command in cli.commands().items()}
    monkeypatch.setattr(cli, "commands", lambda: commands)
    assert cli.dispatch(words) == 0
    (arguments,) = seen
    if hasattr(arguments, "recipe"):
        recipe: Any = load_recipe(arguments.recipe, arguments.overrides).recipe
        parallel = Parallel(recipe.parallel.fsdp, recipe.parallel.ep)
        if getattr(arguments, "processes", None):
            parallel.check(arguments.processes * arguments.nodes)
        parallel.check_experts(settings_of(recipe).n_routed_experts)


def settings_of(recipe: Any) -> Any:
    return known_settings(recipe, find_model(recipe.model, {}, ask_hub=False))


@pytest.mark.parametrize(
    ("name", "full", "sizes", "stated"),
    re.findall(r"^\| (v2\w*/\w+)( with `lora=null`)? \| `(\{.+?\})` \| ([\d.]+) \|", PAGE, flags=re.MULTILINE),
)
def test_stated_memory_is_that_of_plan(name: str, full: str, sizes: str, stated: str) -> None:
    overrides = ["lora=null"] * bool(full) + [f"parallel={sizes}"]
    recipe: Any = load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides).recipe
    load = load_of(recipe, settings_of(recipe), Lengths(None), find_model(recipe.model, {}, ask_hub=False))
    own = memory(load, Layout(recipe.parallel.fsdp, recipe.parallel.ep), USABLE * 80e9)
    assert f"{own.total / 1e9:.1f}" == stated
