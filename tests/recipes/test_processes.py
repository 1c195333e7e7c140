"""`--processes N`: the processes of a command start and end together, and one message says why."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dsv2_start
from recipes.cli import main
from recipes.launch import exit_code_of, without_options

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


CLOSED, LATE = ({"message": f"another process {word}", "closed": word == "ended"} for word in ("ended", "hangs"))


@pytest.mark.parametrize(
    ("failures", "code", "said"),
    [
        ([(2, {}), (-15, {})], 2, ""),  # the first has said why, and the agent stopped the other
        ([(1, CLOSED), (-9, {})], 1, "process 1 was killed (SIGKILL)"),
        ([(130, {}), (-9, {})], 1, "process 1 was killed (SIGKILL)"),
        ([(1, LATE), (-9, {}), (1, CLOSED)], 1, "another process hangs"),  # and was killed for it
        ([(1, CLOSED), (1, CLOSED)], 1, "another process ended"),  # one of another machine
        ([(130, {}), (130, {})], 130, ""),
    ],
)
def test_one_message_says_why_a_launch_ended(
    failures: list[Any], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    by_rank = {rank: SimpleNamespace(exitcode=n, error_file_data=data) for rank, (n, data) in enumerate(failures)}
    assert exit_code_of(SimpleNamespace(failures=by_rank)) == code  # pyright: ignore[reportArgumentType]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == bool(said) and all(line.startswith(f"error: {said}") for line in errors)


@pytest.mark.slow
def test_processes_end_together_with_one_message_and_the_same_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First one of them hangs, then one is killed."""
    monkeypatch.chdir(tmp_path)
    launched.prepare(tmp_path)
    training = {**launched.TRAINING, "max_steps": 10, "learning_rate": 1e-3}
    monkeypatch.setitem(launched.RECIPES, "long", {**launched.RECIPES["full"], "eval_data": [], "training": training})
    assert launched.train("long", tmp_path, "unbroken") == 0
    recipe = json.loads((tmp_path / "unbroken.yaml").read_text()) | {"parallel": {"fsdp": 2}, "output_dir": "run"}
    recipe["training"] |= {"per_device_train_batch_size": launched.BATCH // 2, "ddp_timeout": PATIENCE}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert "did not answer in time while this one was training" in broken(tmp_path, signal.SIGSTOP)
    assert "was killed (SIGKILL)" in broken(tmp_path, signal.SIGKILL)
    assert not (tmp_path / "run" / "final").exists()
    again = subprocess.run(COMMAND, env=environment(), capture_output=True, text=True, timeout=3 * SECONDS)
    assert again.returncode == 0 and "resuming from checkpoint-" in again.stdout, again.stderr
    losses = [[line["loss"] for line in lines(tmp_path / run / "metrics.jsonl") if "loss" in line] for run in RUNS]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 10


RUNS = ("run", "unbroken")
PATIENCE = 10  # seconds
PROGRAM = str(dsv2_start.HOME / "dsv2_start.py")
COMMAND = [sys.executable, PROGRAM, "sft", "recipe.yaml", "--no-cache", "--processes", "2"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the agent has already taken note of it
        return True


def broken(folder: Path, number: signal.Signals) -> str:
    """The one message of a launch that ends because a process got a signal after a checkpoint."""
    before = set(folder.glob("run/checkpoint-*"))
    with (folder / "said").open("w") as said:
        agent = subprocess.Popen(COMMAND, stdout=said, stderr=said, env=environment())
        until = time.monotonic() + 3 * SECONDS
        while time.monotonic() < until and not set(folder.glob("run/checkpoint-*")) - before:
            time.sleep(0.02)
        first, last = map(int, Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split())
        os.kill(last, number)
        if number == signal.SIGSTOP:
            while time.monotonic() < until and not has_ended(first):
                time.sleep(0.1)
            os.kill(last, signal.SIGKILL)  # as the agent does after half a minute
        assert agent.wait(SECONDS) == 1
    errors = [line for line in (folder / "said").read_text().splitlines() if "error" in line]
    assert len(errors) == 1, errors
    return errors[0]
