"""Two gloo processes on the CPU do what one does with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_v2_modeling import DeepseekV2ForCausalLM

from ..helpers import stage_launch
from ..helpers.stages import assert_same_weights, byte_tokenizer, lines, weights

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """The runs that two processes made."""
    folder = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.helpers.stage_launch", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    stage_launch.train_sft_model(folder / "sft", 1)
    stage_launch.reward(folder / "reward", 1)
    (folder / "figures.json").write_text(json.dumps(stage_launch.evaluations(folder)))
    return folder


def steps(folder):
    return [line for line in lines(folder / "metrics.jsonl") if "loss" in line]


def final(folder):
    return DeepseekV2ForCausalLM.from_pretrained(folder / "final", dtype=torch.float32)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_log_what_one_logs(parallel, alone, stage):
    ours, theirs = steps(parallel / stage), steps(alone / stage)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for two, one in zip(ours, theirs, strict=True):
        for key in ("loss", "task_loss", "balance/expert", "grad_norm", "expert_load/max_over_mean"):
            assert two[key] == pytest.approx(one[key], rel=1e-3), (key, two["step"])
        assert two["expert_load/layer_1/share"] == pytest.approx(one["expert_load/layer_1/share"], abs=0.02)
    first_two, first_one = ours[0], theirs[0]
    for key in ("loss", "balance/expert", "grad_norm"):
        assert first_two[key] == pytest.approx(first_one[key], rel=1e-5), key


def test_two_processes_train_the_same_weights(parallel, alone):
    one, two = weights(final(alone / "sft")), weights(final(parallel / "sft"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-3, rtol=1e-2, msg=name)


def test_two_processes_resume_to_the_same_weights(parallel):
    assert_same_weights(final(parallel / "sft"), final(parallel / "straight"))
    assert steps(parallel / "sft") == steps(parallel / "straight")


def test_one_process_writes(parallel):
    for stage in ("sft", "rl"):
        numbers = [line["step"] for line in steps(parallel / stage)]
        assert numbers == sorted(set(numbers))
    assert len(lines(parallel / "straight" / "samples.jsonl")) == 12
    assert not list(parallel.glob("*/.*"))


def test_both_processes_contribute_to_rl(parallel):
    """4 completions a step of one prompt, 2 by each process: their rewards are seen together."""
    for line in steps(parallel / "rl"):
        assert line["completions/mean_length"] > 0
        assert line["kl"] >= 0
        assert 0 <= line["rewards/format/mean"] <= 1
    said = lines(parallel / "rl" / "samples.jsonl")
    assert len([line for line in said if line["step"] == 1]) == 4


def test_both_processes_replace_the_same_groups(parallel):
    """Groups that both have a part of, with one reward for all: the same prompts come in their place."""
    log = steps(parallel / "dynamic")
    assert len(log) == 2 and sum(line["dynamic_sampling/replaced"] for line in log) > 0
    for line in log:
        assert line["groups/left_out"] == line["dynamic_sampling/still_equal"]
        assert line["groups/left_out"] == pytest.approx(3 * line["frac_reward_zero_std"])
    one, two = (torch.load(parallel / "dynamic" / f"weights.{process}.pt") for process in range(2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    files = [parallel / "dynamic" / "checkpoint-2" / f"rollouts_{process}.pt" for process in range(2)]
    one, two = (torch.load(file, weights_only=True) for file in files)
    assert one["prompts"]["drawn"] == two["prompts"]["drawn"] >= 2
    rates, others = one["prompts"]["rates"], two["prompts"]["rates"]
    assert torch.equal(rates.isnan(), others.isnan()) and int((~rates.isnan()).sum()) == log[-1]["curriculum/seen"] >= 6
    rows = [ids for state in (one, two) for part in state["inputs"] for ids in part["prompt_ids"].tolist()]
    prompts = [[token for token in ids if token != byte_tokenizer().pad_token_id] for ids in rows]
    assert prompts == [prompt for prompt in prompts[::4] for _ in range(4)] and len({*map(tuple, prompts)}) == 3
    assert {line["mismatch/routes_agree"] for line in log} == {1.0}


def test_an_evaluation_does_not_depend_on_the_number_of_processes(parallel, alone):
    """Greedy and sampled, with more and with fewer rows than processes, and where it goes on."""
    figures = json.loads((alone / "figures.json").read_text())
    for process in range(2):
        found = json.loads((parallel / f"figures.{process}.json").read_text())
        for run, tasks in figures.items():
            for task, values in tasks.items():
                assert found[run][task].keys() == values.keys()
                for name, value in values.items():
                    wanted = value if value is None else pytest.approx(value, rel=1e-5)  # None: a loss of one row
                    assert found[run][task][name] == wanted, (run, task, name)
    assert figures["again"] == figures["eval"]
    for run in figures:
        one, two = lines(alone / run / "samples.jsonl"), lines(parallel / run / "samples.jsonl")
        for a, b in zip(one, two, strict=True):
            assert {**a, "value": 0, "scores": 0} == {**b, "value": 0, "scores": 0}
            assert a["value"] == pytest.approx(b["value"], rel=1e-5)
        assert [path.name for path in (parallel / run).iterdir()] == ["samples.jsonl"]
    said = lines(alone / "eval" / "samples.jsonl")
    assert [(line["decoding"], line["row"]) for line in said[:10]] == [
        (k, n) for k in ("greedy", "t1") for n in range(5)
    ]
