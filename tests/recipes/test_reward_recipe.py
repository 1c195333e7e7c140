"""What a reward recipe takes of the chat model that it starts from."""

import json
from pathlib import Path

import pytest

from recipes.cli import main
from recipes.runs.new_model import make_model

REWARD = {
    "stage": "reward",
    "model": {"path": "base"},
    "lora": {"targets": ["attention"], "r": 2},
    "data": [{"path": "tiny:helpful_train?n=4"}],
    "sft_coefficient": 1.0,
    "prefix_coefficient": 1.0,
    "training": {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 64},
    "output_dir": "judge",
}


def test_the_chosen_answer_is_learnt_with_a_chat_models_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward model has no such head any more: check and run say so."""
    monkeypatch.chdir(tmp_path)
    make_model(Path("base"), "tiny", 0)
    Path("reward.yaml").write_text(json.dumps(REWARD), encoding="utf-8")
    assert main(["reward", "reward.yaml"]) == 0
    logged = json.loads(Path("judge/metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert logged["sft_loss"] > 0 and logged["prefix_loss"] > 0
    again = ("reward.yaml", "model.path=judge", "output_dir=again")
    for command in ("check", "reward"):
        capsys.readouterr()
        assert main([command, *again]) == 2
        assert "error: judge is a reward model, which scores answers" in capsys.readouterr().err
    assert not Path("again").exists()
    assert main(["reward", *again, "sft_coefficient=0"]) == 0


def reward_of(rows: list[dict], **changes: object) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {key: value for key, value in REWARD.items() if not key.endswith("_coefficient")}
    recipe |= {"data": [{"path": "rows.jsonl"}], **changes}
    Path("reward.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def first_loss(run: str) -> float:
    return json.loads(Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["task_loss"]


PAIR = {"prompt": "Is it?", "chosen": "It is.", "rejected": "No."}


def test_a_margin_reaches_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a number, or as a CSV file's text, under whatever name; without one it is 0, and that is said once."""
    monkeypatch.chdir(tmp_path)
    make_model(Path("base"), "tiny", 0)
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    whole = {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "No."}], "gap": "50.5"}
    reward_of(
        [PAIR | {"gap": 49.5, "margin": None}, whole], data=[{"path": "rows.jsonl", "columns": {"margin": "gap"}}]
    )
    assert main(["check", "reward.yaml"]) == 0
    assert main(["reward", "reward.yaml"]) == 0
    said = capsys.readouterr()
    assert "not used" not in said.out + said.err and "without a margin" not in said.out + said.err
    assert 49 < first_loss("judge") < 51
    reward_of([PAIR | {"margin": 100}, PAIR | {"margin": None}], output_dir="mixed")
    assert main(["check", "reward.yaml"]) == 0
    assert "2 rows; 1 without a margin, which counts as 0" in capsys.readouterr().out
    assert main(["reward", "reward.yaml"]) == 0
    assert capsys.readouterr().err.count("without a margin, which counts as 0") == 1
    assert 49 < first_loss("mixed") < 52


@pytest.mark.parametrize("margin", ["NaN", "1e999", '"much"', "true", "[1]", "1e300", "1" + "0" * 400])
def test_a_margin_that_is_no_number_is_a_bad_row(
    margin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(Path("base"), "tiny", 0)
    reward_of([PAIR, PAIR])
    bad = json.dumps(PAIR)[:-1] + f', "margin": {margin}}}'
    Path("rows.jsonl").write_text(f"{json.dumps(PAIR)}\n{bad}\n", encoding="utf-8")
    for command in ("check", "reward"):
        assert main([command, "reward.yaml"]) == 2
        assert "rows.jsonl:2: margin must be a finite number, not " in capsys.readouterr().err
    assert not Path("judge").exists()


def test_single_answers_have_no_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(Path("base"), "tiny", 0)
    reward_of([{"prompt": "Is it?", "completion": "It is.", "label": True, "margin": 1.0}] * 2, loss="pointwise")
    assert main(["reward", "reward.yaml"]) == 0
    assert "columns not used: margin (2 rows)" in capsys.readouterr().out
    reward_of([PAIR | {"margin": 1.0}], loss="pointwise")
    assert main(["check", "reward.yaml"]) == 2
    assert "is a pair, not an answer with a label or a score" in capsys.readouterr().err


def test_scores_are_centred_unless_the_recipe_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same first batch, whose loss is higher by 0.01 times the square of the two scores' sum."""
    monkeypatch.chdir(tmp_path)
    make_model(Path("base"), "tiny", 0)
    reward_of([PAIR, PAIR])
    for value in ("null", "0", "0.01", "0.02"):
        stated = (f"training.center_rewards_coefficient={value}", f"output_dir=centre_{value}")
        assert main(["reward", "reward.yaml", *stated]) == 0
    assert main(["reward", "reward.yaml"]) == 0
    null, off, small, more, unstated = (
        first_loss(run) for run in ("centre_null", "centre_0", "centre_0.01", "centre_0.02", "judge")
    )
    assert null == off < small == unstated
    assert more - null == pytest.approx(2 * (small - null), rel=1e-3)
    assert main(["check", "reward.yaml", "loss=pointwise", "training.center_rewards_coefficient=0.01"]) == 2
