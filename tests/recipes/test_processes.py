"""`--processes N`: the processes of a command start and end together, and one message says why."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dsv2_start
from recipes.cli import main
from recipes.launch import without_options

from ..helpers import sharded_launch as launched
from ..helpers.stages import lines

SECONDS = 60  # after one process was killed, until all have ended


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--processes", "0"], "--processes is 0"),
        (["--nodes", "2"], "need --processes"),
        (["--processes", "2", "--nodes", "2"], "--rendezvous HOST:PORT"),
        (["--processes", "2", "--rendezvous", "a:1"], "belong together"),
    ],
)
def test_what_makes_no_launch_is_refused(words: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "unread.yaml", *words]) == 2
    assert fault in capsys.readouterr().err


def test_a_launch_inside_of_another_is_refused(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["sft", "unread.yaml", "--processes", "2"]) == 2
    assert "leave it out under torchrun" in capsys.readouterr().err


def test_the_words_of_a_launch_are_not_those_of_its_processes() -> None:
    words = ["sft", "a.yaml", "--processes", "2", "--nodes=2", "--rendezvous", "a:1", "lora.r=2", "--smoke"]
    assert without_options(words) == ["sft", "a.yaml", "lora.r=2", "--smoke"]


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_message_and_the_same_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launched.prepare(tmp_path)
    training = {**launched.TRAINING, "max_steps": 10, "learning_rate": 1e-3}
    monkeypatch.setitem(launched.RECIPES, "long", {**launched.RECIPES["full"], "eval_data": [], "training": training})
    assert launched.train("long", tmp_path, "unbroken") == 0
    recipe = json.loads((tmp_path / "unbroken.yaml").read_text()) | {"parallel": {"fsdp": 2}, "output_dir": "run"}
    recipe["training"]["per_device_train_batch_size"] //= 2
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    program = str(dsv2_start.HOME / "dsv2_start.py")
    command = [sys.executable, program, "sft", "recipe.yaml", "--no-cache", "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "said").open("w") as said:
        agent = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        os.kill(first_child(agent.pid, tmp_path / "run"), signal.SIGKILL)
        assert agent.wait(SECONDS) == 1
    errors = [line for line in (tmp_path / "said").read_text().splitlines() if "error" in line]
    assert len(errors) == 1 and "was killed (SIGKILL)" in errors[0], errors
    assert not (tmp_path / "run" / "final").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3 * SECONDS)
    assert again.returncode == 0 and "resuming from checkpoint-" in again.stdout, again.stderr
    losses = [[line["loss"] for line in lines(tmp_path / run / "metrics.jsonl") if "loss" in line] for run in RUNS]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 10


RUNS = ("run", "unbroken")


def first_child(agent: int, run: Path) -> int:
    """A process of a launch, once it has written a checkpoint."""
    until = time.monotonic() + 3 * SECONDS
    while time.monotonic() < until and not list(run.glob("checkpoint-*")):
        time.sleep(0.02)
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return int(children[-1])
