"""Recipes that train on preferences, through the command line: what is refused, and what a run leaves."""

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.cli import main
from recipes.files import read_json

from ..helpers.broken_recipes import RECIPES, make_world
from ..helpers.stages import lines


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
    logged = lines(Path("out", "metrics.jsonl"))
    assert {"rewards/accuracies", "logps/chosen"} <= logged[0].keys() and "logits/chosen" not in logged[0]
    assert (Path("out", "final", "adapter_model.safetensors")).exists()
    assert list(Path("runs", "prepared").glob("reference-*"))
    assert main(["report", "out"]) == 0
    page = Path("out", "report.html").read_text()
    assert "preferences (DPO)" in page and "Margin of chosen over rejected" in page
    assert "samples.jsonl is missing" not in page
    assert main(["rl", "dpo.yaml", "model.path=out", "method=orpo", "training.max_steps=1", "output_dir=next"]) == 0


def test_kto_takes_pairs_and_labelled_answers_together(world: Path) -> None:
    words = ["data=[{path: pairs.jsonl}, {path: judged.jsonl}]", "training.max_steps=-1", "training.num_train_epochs=1"]
    assert main(["rl", "kto.yaml", *words]) == 0
    manifest = read_json(Path("out", "manifest.json"))
    assert manifest["metrics"]["rows"] == 16 and manifest["metrics"]["steps"] == 12  # 8 pairs and 8 answers, 2 a step
