"""Two processes that share the weights (FSDP2) do what one does with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_v2_modeling import DeepseekV2ForCausalLM, merge_lora
from recipes.cli import main

from ..helpers import sharded_launch as launched
from ..helpers.stages import lines, weights

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
LIMIT = 240  # seconds; nothing may hang


@pytest.fixture(scope="module")
def runs(tmp_path_factory, module_patch):
    """All runs: of one process, then of two, then what one goes on with."""
    folder = tmp_path_factory.mktemp("sharded")
    module_patch.chdir(folder)
    launched.prepare(folder)
    for name in launched.RECIPES:
        assert launched.train(name, folder, f"one_{name}", sharded=False) == 0
    for name in ("full", "lora"):
        launched.stopped_at_2(folder / f"one_{name}", folder / f"one_to_two_{name}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.helpers.sharded_launch", str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("full", "lora"):
        launched.stopped_at_2(folder / f"two_{name}", folder / f"two_to_one_{name}")
        assert launched.train(name, folder, f"two_to_one_{name}", sharded=False) == 0
    return folder


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def steps(run: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(run / "metrics.jsonl") if key in line]


@pytest.mark.parametrize(
    ("name", "rel"), [("full", 1e-5), ("lora", 1e-5), ("quantized", 1e-5), ("reward", 1e-4), ("packed", 2e-2)]
)
def test_losses_are_those_of_one_process(runs: Path, name: str, rel: float) -> None:
    one, two = steps(runs / f"one_{name}"), steps(runs / f"two_{name}")
    assert len(one) == launched.TRAINING["max_steps"]
    assert two == pytest.approx(one, rel=rel)
    assert steps(runs / f"two_{name}", "balance/expert") == pytest.approx(
        steps(runs / f"one_{name}", "balance/expert"), rel=max(rel, 1e-4)
    )


def test_held_out_losses_and_samples_are_those_of_one_process(runs: Path) -> None:
    assert steps(runs / "two_full", "eval_loss") == pytest.approx(steps(runs / "one_full", "eval_loss"), rel=1e-5)
    one, two = (lines(runs / f"{run}_full" / "samples.jsonl") for run in ("one", "two"))
    assert [(line["when"], line["prompt"]) for line in two] == [(line["when"], line["prompt"]) for line in one]
    # Losses differ by rounding, and with them what a model of random weights says, and whether it says anything.
    assert all("completion" in line for line in two)


@pytest.mark.parametrize("name", list(launched.RECIPES))
def test_all_weights_are_shared(runs: Path, name: str) -> None:
    """No silent data parallelism: every parameter, adapters too, is a DTensor."""
    kinds = json.loads((runs / f"two_{name}.kinds.json").read_text())
    assert kinds and all(kinds.values()), [parameter for parameter, shared in kinds.items() if not shared]


def test_the_result_loads_strictly_and_is_that_of_one_process(runs: Path, tmp_path: Path) -> None:
    for name in ("full", "lora"):
        finals = [runs / f"{run}_{name}" / "final" for run in ("one", "two")]
        if name == "lora":
            for run, final in zip(("one", "two"), finals, strict=True):
                merge_lora(final, tmp_path / run)
            finals = [tmp_path / "one", tmp_path / "two"]
        one, two = (weights(DeepseekV2ForCausalLM.from_pretrained(final, dtype=torch.float32)) for final in finals)
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=2e-3, rtol=1e-2, msg=f"{name}: {key}")
    assert (runs / "two_reward" / "final" / "reward_stats.json").is_file()


@pytest.mark.parametrize(
    ("resumed", "whole"),
    [
        ("two_again", "two_full"),
        ("lora_again", "two_lora"),
        ("one_to_two_full", "one_full"),
        ("one_to_two_lora", "one_lora"),
        ("two_to_one_full", "two_full"),
        ("two_to_one_lora", "two_lora"),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, resumed: str, whole: str) -> None:
    assert steps(runs / resumed) == pytest.approx(steps(runs / whole), rel=1e-5)
    assert len(steps(runs / resumed)) == 4
    assert json.loads((runs / resumed / "manifest.json").read_text())["status"] == "finished"


def test_sizes_that_do_not_divide_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(runs / "two_full.yaml"), "output_dir=none"]) == 2
    said = capsys.readouterr().err
    assert "parallel.fsdp is 2 and there is one process" in said and "--processes 2" in said
    assert not (runs / "none").exists()
