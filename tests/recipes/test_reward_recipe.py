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
