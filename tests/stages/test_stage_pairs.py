"""`dsv2 pairs` through the command line: its files, interruption, batches, chains, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conversations import load_conversations
from pairs.stage import _summary
from recipes.cli import main as dsv2

from ..helpers.stages import lines

# Scores differ between answers, and a random model's ones have no right or wrong.
REWARD = """
def vowels(prompts, completions):
    return [sum(letter in "aeiou" for letter in c[-1]["content"]) / 10 for c in completions]


def short(prompts, completions):
    return [None if len(c[-1]["content"]) > 40 else 1.0 for c in completions]
"""
FILES = ("pairs.jsonl", "scored.jsonl", "best.jsonl", "results.json", "samples.jsonl")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose answers end, prompts, a reward and a recipe."""
    folder = tmp_path_factory.mktemp("pairs")
    assert dsv2(["init", str(folder / "base"), "--preset", "tiny"]) == 0
    settings = folder / "base" / "generation_config.json"
    ends_soon = {"exponential_decay_length_penalty": [3, 4.0]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | ends_soon))
    rows = [{"messages": [{"role": "user", "content": f"What is {n} + 1?"}], "reference": str(n + 1)} for n in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    (folder / "rewards.py").write_text(REWARD)
    recipe = {
        "stage": "pairs",
        "model": {"path": str(folder / "base")},
        "data": [{"path": str(folder / "rows.jsonl")}],
        "rewards": [{"python": f"{folder / 'rewards.py'}:vowels"}],
        "num_generations": 4,
        "max_new_tokens": 12,
        "batch_size": 8,
        "balance_lengths": False,
        "output_dir": str(folder / "unset"),
    }
    (folder / "pairs.yaml").write_text(json.dumps(recipe))
    return folder


def pairs_run(home: Path, name: str, *overrides: str) -> Path:
    assert dsv2(["pairs", str(home / "pairs.yaml"), f"output_dir={home / name}", *overrides]) == 0
    return home / name


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    return pairs_run(home, "run")


def test_the_files_say_what_was_sampled_and_how_it_was_judged(run: Path):
    samples, results = lines(run / "samples.jsonl"), json.loads((run / "results.json").read_text())
    assert [(s["row"], s["answer"]) for s in samples] == [(row, answer) for row in range(8) for answer in range(4)]
    assert all(sample["reference"] == str(sample["row"] % 7 + 1) and sample["tokens"] > 0 for sample in samples)
    assert results["prompts"] == 8 and results["answers"] == 32 and results["all_right"] is None
    by_place = {(s["row"], s["answer"]): s for s in samples}
    pairs = lines(run / "pairs.jsonl")
    assert len(pairs) == results["pairs"] > 4
    for pair in pairs:
        row, (good, bad) = pair["meta"]["sampling"]["row"], pair["meta"]["sampling"]["answers"]
        good, bad = by_place[row, good], by_place[row, bad]
        assert pair["prompt"] == [{"role": "user", "content": good["prompt"]}]
        assert pair["chosen"] == [{"role": "assistant", "content": good["completion"]}]
        assert pair["rejected"] == [{"role": "assistant", "content": bad["completion"]}]
        assert (
            pair["margin"] == pytest.approx(good["rewards"]["vowels"] - bad["rewards"]["vowels"]) and pair["margin"] > 0
        )
        assert pair["meta"]["verdicts"]["chosen"] == {"vowels": {"score": good["rewards"]["vowels"]}}
        assert not good["truncated"] and not bad["truncated"]
    assert len({json.dumps([p["prompt"], p["chosen"], p["rejected"]]) for p in pairs}) == len(pairs)
    best = lines(run / "best.jsonl")
    rewards = {
        row: max(s["rewards"]["vowels"] for s in samples if s["row"] == row and not s["truncated"]) for row in range(8)
    }
    for row in best:
        place = row["meta"]["sampling"]
        assert by_place[place["row"], place["answers"][0]]["rewards"]["vowels"] == rewards[place["row"]]


def test_the_summary_counts_what_is_not_in_a_pair():
    counts = {"prompts": 1200, "answers": 4800, "usable": 7, "pairs": 9, "all_right": 3, "all_wrong": 2}
    others = {"truncated": 11, "unjudged": 12, "unreadable": 13, "duplicates": 14}
    summary = _summary({**counts, **others, "left_out": {"min_margin": 0, "balance_lengths": 5}})
    assert summary == (
        "pairs: 1,200 prompts (3 all right, 2 all wrong), 4,800 answers (11 truncated, 12 unjudged, 13 unreadable, "
        "14 duplicates); 7 prompts usable; 9 pairs; left out: 5 by balance_lengths"
    )


def test_the_files_are_data_of_the_other_stages(run: Path):
    pairs = list(load_conversations(run / "pairs.jsonl"))
    assert pairs[0].keys() >= {"prompt", "chosen", "rejected", "margin"}
    assert pairs[0]["margin"] == lines(run / "pairs.jsonl")[0]["margin"]
    assert next(iter(load_conversations(run / "scored.jsonl"))).keys() >= {"prompt", "completion", "score"}
    assert next(iter(load_conversations(run / "best.jsonl"))).keys() >= {"messages"}


def test_an_interrupted_run_ends_with_the_same_files(home: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    again = pairs_run(home, "again")
    for name in FILES[:4]:
        (again / name).unlink()
    manifest = json.loads((again / "manifest.json").read_text())
    (again / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    text = (again / "samples.jsonl").read_text()
    (again / "samples.jsonl").write_text(text[: len(text) // 2])  # in the middle of a line
    pairs_run(home, "again")
    assert "answers of the interrupted run are reused" in capsys.readouterr().err
    for name in FILES:
        assert (again / name).read_bytes() == (run / name).read_bytes(), name
    pairs_run(home, "again")
    assert "nothing to do" in capsys.readouterr().out


KILLED = """
import os, signal, sys

import pairs.stage
from recipes.cli import main

real, calls = pairs.stage.append_lines, 0


def deadly(*args):
    global calls
    calls += 1
    real(*args)
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)


pairs.stage.append_lines = deadly
main(["pairs", *sys.argv[1:]])
"""


def test_a_run_that_was_killed_in_its_middle_ends_with_the_same_files(
    home: Path, run: Path, capsys: pytest.CaptureFixture[str]
):
    words = [str(home / "pairs.yaml"), f"output_dir={home / 'killed'}", "batch_size=2"]  # two prompts at a time
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (home / "killed" / "pairs.jsonl").exists()
    pairs_run(home, "killed", "batch_size=2")
    assert "16 answers of the interrupted run are reused" in capsys.readouterr().err
    for name in FILES:
        assert (home / "killed" / name).read_bytes() == (run / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_write_the_same_files(home: Path, run: Path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    words = [
        str(Path(sys.executable).with_name("dsv2")),
        "pairs",
        str(home / "pairs.yaml"),
        f"output_dir={home / 'two'}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in FILES:
        assert (home / "two" / name).read_bytes() == (run / name).read_bytes(), name


def test_the_batch_changes_nothing(home: Path, run: Path):
    other = pairs_run(home, "batch", "batch_size=3")
    for name in FILES:
        assert (other / name).read_bytes() == (run / name).read_bytes(), name


def test_the_report_shows_the_best_beside_the_worst(run: Path):
    assert dsv2(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "highest reward" in page and "lowest reward" in page


def test_another_seed_gives_other_answers(home: Path, run: Path):
    other = pairs_run(home, "seed", "seed=1", "limit=2")
    assert len(lines(other / "samples.jsonl")) == 8
    assert [s["completion"] for s in lines(other / "samples.jsonl")] != [
        s["completion"] for s in lines(run / "samples.jsonl")[:8]
    ]


def test_right_and_wrong_are_counted_by_rules(home: Path):
    results = json.loads((pairs_run(home, "rule", "rewards=[{rule: number}]") / "results.json").read_text())
    assert results["all_wrong"] == 8 and results["all_right"] == 0  # a random model does not add
    assert results["usable"] == results["pairs"] == results["best"] == 0
    assert results["by_verifier"] == {"number": {"n": 32, "mean": 0.0}}


def test_truncated_and_unjudged_answers_are_in_no_pair(home: Path):
    rewards = f"rewards=[{{python: '{home / 'rewards.py'}:vowels'}}, {{python: '{home / 'rewards.py'}:short'}}]"
    out = pairs_run(home, "cut", "max_new_tokens=5", rewards)
    results, samples = json.loads((out / "results.json").read_text()), lines(out / "samples.jsonl")
    cut = [s for s in samples if s["truncated"]]
    assert results["truncated"] == len(cut) > 0
    unjudged = [s for s in samples if s["rewards"]["short"] is None and not s["truncated"]]
    assert results["unjudged"] == len(unjudged)
    assert results["scored"] == 32 - len(cut) - len(unjudged) - results["duplicates"]


def test_a_chain_trains_on_the_pairs_of_an_earlier_stage(home: Path, capsys: pytest.CaptureFixture[str]):
    reward: dict[str, Any] = {
        "stage": "reward",
        "model": {"path": str(home / "base")},
        "data": [{"path": "later.jsonl"}],
        "training": {"max_steps": 1, "per_device_train_batch_size": 2},
        "output_dir": "alone",
    }
    (home / "reward.yaml").write_text(json.dumps(reward))
    chain = {
        "stage": "chain",
        "model": {"path": str(home / "base")},
        "output_dir": str(home / "chain"),
        "stages": [
            {"name": "pairs", "recipe": "pairs.yaml", "limit": 3},
            {"name": "reward", "recipe": "reward.yaml", "data": [{"path": "${pairs}/pairs.jsonl"}]},
        ],
    }
    (home / "chain.yaml").write_text(json.dumps(chain))
    assert dsv2(["check", str(home / "chain.yaml")]) == 0
    assert "data: written by an earlier stage" in capsys.readouterr().out
    assert dsv2(["run", str(home / "chain.yaml")]) == 0
    assert (home / "chain" / "reward" / "final" / "reward_stats.json").exists()
    assert dsv2(["check", str(home / "chain.yaml")]) == 0
    assert "pairs.jsonl: preference pairs with prompt" in capsys.readouterr().out
    assert dsv2(["report", str(home / "chain")]) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards=[]"], "rewards"),
        (["temperature=0"], "temperature"),
        (["num_generations=1"], "num_generations"),
        (["rewards=[{rule: nubmer}]"], "unknown rule 'nubmer'"),
        (["rewards=[{model: none}]"], "none does not exist"),
        (["rewards=[{python: none.py:f}]"], "none.py"),
        (["max_pairs=3"], 'unknown key "max_pairs", did you mean "max_pairs_per_prompt"?'),
        (["max_new_tokens=600"], "positions of the model"),
    ],
)
def test_what_is_wrong_is_one_line(home: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert dsv2(["pairs", str(home / "pairs.yaml"), f"output_dir={home / 'bad'}", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1
    assert not (home / "bad").exists()
