"""Recipes that train on preferences, through the command line: what is refused, and what a run leaves."""

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.cli import main
from recipes.files import read_json

from ..helpers.broken_recipes import RECIPES, make_world
from ..helpers.stages import assistant, lines, user

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_world(tmp_path)
    for name in ("rl", "dpo", "kto", "simpo"):
        Path(f"{name}.yaml").write_text(json.dumps(RECIPES[name]))
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "words", "told"),
    [
        ("dpo", ["rewards=[{rule: format}]"], "rewards: for method: grpo"),
        ("dpo", ["dynamic_sampling={max_rounds: 2}"], "dynamic_sampling: for method: grpo"),
        ("dpo", ["data=[{path: judged.jsonl}]"], "not a pair of chosen and rejected"),
        ("dpo", ["data=[{path: chat.jsonl}]"], "not a pair of chosen and rejected"),
        ("dpo", ["method=ppo"], "method: must be 'grpo', 'dpo'"),
        ("dpo", ["method=grpo"], "needs rewards"),
        ("dpo", ["format={too_long: split}"], "preferences need truncate or drop"),
        ("dpo", ["format={train_on: all_assistant}"], "plays no part in preferences"),
        ("dpo", ["training.sync_ref_model=true"], "computed once"),
        ("dpo", ["training.precompute_ref_log_probs=false"], "is True in method: dpo"),
        ("dpo", ["training.loss_type=ipo"], "write method: ipo"),
        ("dpo", ["training.loss_type=banana"], "banana"),
        ("dpo", ["method=ipo", "training.loss_type=hinge"], "is ['ipo'] in method: ipo"),
        ("dpo", ["training.beta=0"], "learns nothing from preferences"),
        ("dpo", ["training.num_generations=4"], "DPOConfig has no such field"),
        ("dpo", ["training.truncation_mode=keep_end"], "write format.too_long"),
        ("dpo", ["training.metric_for_best_model=banana"], "is not one of loss, rewards/accuracies"),
        ("simpo", ["training.cpo_alpha=-1"], "at least 0"),
        ("simpo", ["training.generate_during_eval=true"], "nothing is generated"),
        ("kto", ["training.per_device_train_batch_size=1"], "needs at least 2"),
        ("kto", ["data=[{path: scored.jsonl}]"], "label must be true or false"),
        ("rl", ["format={too_long: drop}"], "not for grpo"),
        ("rl", ["rewards=[]"], "needs rewards"),
    ],
)
def test_what_cannot_work_is_refused(world: Path, recipe: str, words: list[str], told: str, capsys: Any) -> None:
    assert main(["check", f"{recipe}.yaml", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_pair_without_rejected_is_named(world: Path, capsys: Any) -> None:
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    del rows[2]["rejected"]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["check", "dpo.yaml"]) == 2
    assert "pairs.jsonl:3" in capsys.readouterr().err


def test_a_run_leaves_what_a_report_and_a_later_stage_need(world: Path, capsys: Any) -> None:
    assert main(["check", "dpo.yaml"]) == 0
    assert "of them trained" in capsys.readouterr().out
    assert main(["rl", "dpo.yaml"]) == 0
    manifest = read_json(Path("out", "manifest.json"))
    assert manifest["status"] == "finished" and {"rewards/margins", "eval_loss"} <= manifest["metrics"].keys()
    said = lines(Path("out", "samples.jsonl"))
    assert [(line["when"], line["step"]) for line in said] == [("before", 0)] * 6 + [("after", 1)] * 6
    assert [line["prompt"] for line in said] == [f"ask {i}" for i in range(6)] * 2
    assert {line["reference"] for line in said} == {"yes, gladly"} and all("completion" in line for line in said)
    logged = lines(Path("out", "metrics.jsonl"))
    assert {"rewards/accuracies", "logps/chosen"} <= logged[0].keys() and "logits/chosen" not in logged[0]
    assert (Path("out", "final", "adapter_model.safetensors")).exists()
    assert list(Path("runs", "prepared").glob("reference-*"))
    assert main(["report", "out"]) == 0
    page = Path("out", "report.html").read_text()
    assert "preferences (DPO)" in page and "Margin of chosen over rejected" in page
    assert "samples.jsonl is missing" not in page and "asked at both steps" in page
    assert main(["rl", "dpo.yaml", "model.path=out", "method=orpo", "training.max_steps=1", "output_dir=next"]) == 0


def test_a_chain_trains_on_pairs_of_its_own_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The shipped chain at smoke size, but for an SFT that teaches to answer with some digit: one in ten is right."""
    monkeypatch.chdir(tmp_path)
    sums = [{"messages": user(f"{i} + 1") + assistant(f"{i * 7 % 10}"), "reference": f"{i % 10}"} for i in range(24)]
    Path("sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in sums))
    tasks = {"exact_match": "problems", "polite": "problems", "refusal_unsafe": "unsafe", "refusal_safe": "safe"}
    words = [f"stages.{name}.data=[{{path: sums.jsonl}}]" for name in ("sft", "pairs")]
    of_sft = {
        "max_steps": 9,
        "per_device_train_batch_size": 24,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
    }
    words += [f"stages.sft.training.{name}={value}" for name, value in of_sft.items()]
    of_pairs = ("limit=24", "max_new_tokens=6", "num_generations=6", "batch_size=144", "balance_lengths=false")
    words += [f"stages.pairs.{field}" for field in of_pairs]
    for stage in ("eval_sft", "eval_dpo"):
        words += [f"stages.{stage}.tasks.{name}.data=[{{path: 'tiny:test_{of}?n=2'}}]" for name, of in tasks.items()]
        words += [f"stages.{stage}.tasks.{name}.max_new_tokens=2" for name in tasks]
    command = ["run", str(ROOT / "recipes" / "tiny" / "chain_dpo.yaml"), "--smoke", "output_dir=out", *words]
    assert main(command) == 0
    results = read_json(Path("out", "results.json"))
    assert results["stages"].keys() == {"sft", "dpo"} and "dpo_gain" in results
    manifest = read_json(Path("out", "dpo", "manifest.json"))
    assert manifest["metrics"]["rows"] > 1 and "rewards/margins" in manifest["metrics"]
    assert {line["when"] for line in lines(Path("out", "dpo", "samples.jsonl"))} == {"before", "after"}
    capsys.readouterr()
    assert main(command) == 0 and read_json(Path("out", "results.json")) == results


def test_kto_takes_pairs_and_labelled_answers_together(world: Path) -> None:
    words = ["data=[{path: pairs.jsonl}, {path: judged.jsonl}]", "training.max_steps=-1", "training.num_train_epochs=1"]
    assert main(["rl", "kto.yaml", *words]) == 0
    manifest = read_json(Path("out", "manifest.json"))
    good = {line["prompt"]: line["reference"] for line in lines(Path("out", "samples.jsonl"))}
    assert len(good) == 6 and set(good.values()) <= {"yes, gladly", "yes", None}
    assert manifest["metrics"]["rows"] == 16 and manifest["metrics"]["steps"] == 12  # 8 pairs and 8 answers, 2 a step
