"""Answers are not sampled from weights that are sharded over processes: one message before the run, never a hang."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.cli import main

from ..helpers.broken_recipes import RECIPES, make_world

WHY = "FSDP shards the weights over processes, and answers are sampled from whole ones; leave it out"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "recipes.cli")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_world(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPES["rl"]))
    return tmp_path


@pytest.mark.parametrize("command", ["check", "rl"])
@pytest.mark.parametrize("launched", [True, False])
def test_fsdp_is_refused(world: Path, command: str, launched: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    if launched:  # by accelerate launch --use_fsdp
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    asked = [] if launched else ["training.fsdp=full_shard"]
    assert main([command, "recipe.yaml", *asked]) == 2
    assert WHY in " ".join(capsys.readouterr().err.split()) and not (world / "out").exists()


@pytest.mark.slow
def test_two_ranks_of_fsdp2_end_at_once(world: Path):
    """Within the time limit, with one message of each rank."""
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    environment = {**os.environ, **sharded, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, *TORCHRUN, "rl", "recipe.yaml", "training.use_cpu=true"]
    done = subprocess.run(words, cwd=world, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1  # torchrun's own, whatever a rank's is
    said = " ".join(done.stderr.split())
    assert "Traceback" not in said[: said.index(WHY)]
    assert not (world / "out").exists()
