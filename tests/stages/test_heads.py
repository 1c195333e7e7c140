"""Several score heads on one backbone: trained, saved, loaded, combined in rl and eval; one head stays what it was."""

import json
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from conversations.answers.combining import COMBINE
from conversations.answers.reward_stats import RewardStats
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer
from conversations.rewards.model import RewardModelReward
from deepseek_v2_modeling.inference import score_heads, score_sequences
from deepseek_v2_modeling.loading import load_model, resolve_source
from recipes.cli import main
from recipes.files import read_json
from recipes.recipe.yaml_text import read_mapping
from reward.trainers import PairCollator, bootstrap_weights, pairwise_loss

from ..helpers.models import random_ids
from ..helpers.stages import assistant, byte_tokenizer, chat_model, lines, pairs, score_model, user

HEADS = 3


def reward_recipe(**changes: Any) -> dict[str, Any]:
    training = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 64}
    return {
        "stage": "reward", "model": {"path": "base"}, "data": [{"path": "pairs.jsonl"}], "heads": HEADS,
        "eval_data": [{"path": "pairs.jsonl"}], "training": training, "output_dir": "rm", **changes,
    }  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    chat_model().save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    judged = [{"prompt": user(f"a {i}"), "completion": assistant("yes"), "label": bool(i % 2)} for i in range(8)]
    for name, rows in {"pairs": pairs(8), "judged": judged}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def started(recipe: dict[str, Any]) -> int:
    Path("r.yaml").write_text(json.dumps(recipe))
    return main([recipe["stage"], "r.yaml"])


@pytest.mark.parametrize("lora", [None, {"targets": ["attention"], "r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize(
    "how", [{"sft_coefficient": 1.0, "prefix_coefficient": 1.0}, {"loss": "pointwise"}], ids=["pairwise", "pointwise"]
)
def test_trained_saved_and_used(home: Path, how: dict[str, Any], lora: Any) -> None:
    data = [{"path": "judged.jsonl" if "loss" in how else "pairs.jsonl"}]
    assert started(reward_recipe(lora=lora, data=data, eval_data=data, **how)) == 0
    model: Any = load_model(resolve_source("rm"), head="score")
    assert model.config.num_labels == model.config.reward_heads == HEADS
    scores = score_heads(model, random_ids(4, 9).tolist(), pad_token_id=2)
    assert all(len(set(heads)) == HEADS for heads in scores)
    stats = RewardStats.read(Path("rm/final"))
    assert len(stats.heads) == HEADS and stats.mean == pytest.approx(fmean(head.mean for head in stats.heads))
    if lora is None:
        assert read_json(Path("rm/final/config.json"))["reward_heads"] == HEADS

    said = {}
    for combine in COMBINE:
        task = {"name": "ranked", "metric": "reward", "combine": combine, "data": data}
        recipe = {"stage": "eval", "model": {"path": "rm"}, "tasks": [task], "output_dir": combine}
        assert started(recipe) == 0
        said[combine] = [line["scores"][0] for line in lines(Path(combine, "samples.jsonl"))]
    assert all(least <= mean for least, mean in zip(said["min"], said["mean"], strict=True))
    assert said["mean"] != said["min"] != said["mean_minus_std"]


def test_an_adapter_of_several_heads_is_merged(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert started(reward_recipe(lora={"targets": ["attention", "experts"], "r": 2})) == 0
    assert main(["merge", "rm", "merged"]) == 0
    assert read_json(Path("merged/config.json"))["reward_heads"] == HEADS
    assert RewardStats.read(Path("merged")) == RewardStats.read(Path("rm/final"))
    ids = random_ids(4, 9).tolist()
    adapted, merged = (
        score_heads(load_model(resolve_source(path), head="score"), ids, pad_token_id=2) for path in ("rm", "merged")
    )
    torch.testing.assert_close(torch.tensor(merged), torch.tensor(adapted), atol=1e-5, rtol=0)
    assert main(["export", "rm", "exported", "--layout", "per_expert"]) == 2  # no server reads a score head
    assert "score.weight); use: dsv2 merge" in capsys.readouterr().err and not Path("exported").exists()


def test_rl_combines_them(home: Path) -> None:
    assert started(reward_recipe()) == 0
    training = {
        "max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 3,
        "steps_per_generation": 1,
    }  # fmt: skip
    rewards = [{"model": "rm", "combine": "min"}]
    recipe = {
        "stage": "rl", "model": {"path": "base"}, "data": [{"path": "pairs.jsonl"}], "rewards": rewards,
        "training": training, "output_dir": "rl",
    }  # fmt: skip
    assert started(recipe) == 0
    assert read_mapping(Path("rl/recipe.yaml"))["rewards"][0]["combine"] == "min"
    wrong = {**recipe, "rewards": [{"rule": "format", "combine": "min"}], "output_dir": "other"}
    assert started(wrong) == 2


@pytest.mark.parametrize("combine", COMBINE)
def test_each_head_is_normalised_before_they_are_combined(combine: Any) -> None:
    model, tokenizer = score_model(num_labels=HEADS).eval(), byte_tokenizer()
    by_head = tuple(RewardStats(mean, std, 9) for mean, std in ((0.5, 2.0), (-1.0, 0.1), (3.0, 1.0)))
    stats = RewardStats(0.0, 1.0, 9, by_head)
    answers = [Answer(user("a"), text) for text in ("yes", "no", "yes")]
    values = RewardModelReward("rm", model, tokenizer, stats=stats, combine=combine).judge(answers)
    plain = RewardModelReward("rm", model, tokenizer)
    raw = score_heads(model, [plain._ids(answer) for answer in answers], pad_token_id=2)
    for value, heads in zip(values, raw, strict=True):
        normal = [(score - one.mean) / one.std for score, one in zip(heads, by_head, strict=True)]
        expected = {"mean": fmean(normal), "min": min(normal), "mean_minus_std": fmean(normal) - pstdev(normal)}
        assert value == pytest.approx(expected[combine], rel=1e-4)
    clipped = RewardModelReward("rm", model, tokenizer, stats=stats, combine=combine, clip=0.01).judge(answers)
    assert all(value is not None and abs(value) <= 0.01 for value in clipped)


def test_statistics_of_another_number_of_heads_are_refused() -> None:
    with pytest.raises(ToolkitError, match="3 heads and statistics of 1"):
        RewardModelReward("rm", score_model(num_labels=HEADS), byte_tokenizer(), stats=RewardStats(0.0, 1.0, 9))


def test_one_head_stays_what_it_was(home: Path) -> None:
    """Its config and statistics name no heads; stock's class and a trainer without the field give the same."""
    assert started(reward_recipe(heads=1)) == 0
    assert "reward_heads" not in read_json(Path("rm/final/config.json"))
    assert set(read_json(Path("rm/final/reward_stats.json"))) == {"mean", "std", "n"}
    stock = AutoModelForSequenceClassification.from_pretrained("rm/final").eval()
    rows = random_ids(3, 9).tolist()
    model: Any = load_model(resolve_source("rm"), head="score")
    assert [heads[0] for heads in score_heads(model, rows, pad_token_id=2)] == score_sequences(
        model, rows, pad_token_id=2
    )
    assert stock.config.num_labels == 1
    batch = PairCollator(2)([{"chosen_ids": [1, 2], "rejected_ids": [3], "answer_tokens": 1, "margin": None}])
    assert "head_weights" not in batch


def test_several_heads_train_to_the_same_weights_again(home: Path) -> None:
    assert started(reward_recipe()) == 0
    other = reward_recipe(output_dir="two")
    assert started(other) == 0
    one, two = (load_model(resolve_source(name), head="score").state_dict() for name in ("rm", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@given(st.lists(st.integers(0, 10**5), min_size=1, max_size=20), st.integers(0, 9))
def test_a_row_has_the_same_weights_wherever_it_is_met(ids: list[int], seed: int) -> None:
    weights = bootstrap_weights(ids, 4, seed)
    assert weights == bootstrap_weights(list(ids), 4, seed) and all(w >= 0 and w == int(w) for w in weights)


def test_each_head_has_a_bootstrap_sample_of_its_own() -> None:
    drawn = torch.tensor([bootstrap_weights([row, 1, 2], 2, 0) for row in range(4000)], dtype=torch.float)
    assert drawn.mean(0).tolist() == pytest.approx([1, 1], abs=0.05)
    assert (drawn == 0).float().mean(0).tolist() == pytest.approx([0.368, 0.368], abs=0.03)
    assert abs(torch.corrcoef(drawn.T)[0, 1].item()) < 0.05
    assert bootstrap_weights([1, 2], 40, 0) != bootstrap_weights([1, 2], 40, 1)


def test_the_weighted_loss() -> None:
    """Weights of 1 give TRL's own loss; a head whose weight is 0 gets no gradient."""
    scores, margin = torch.randn(6, 2, requires_grad=True), torch.tensor([0.0, 0.5, 1.0])
    good, bad = scores.chunk(2)
    plain = -torch.nn.functional.logsigmoid(good - bad - margin[:, None]).mean() + 0.01 * ((good + bad) ** 2).mean()
    torch.testing.assert_close(pairwise_loss(scores, margin, torch.ones(3, 2), 0.01), plain)
    pairwise_loss(scores, margin, torch.tensor([[1.0, 0.0]] * 3), 0.01).backward()
    assert scores.grad is not None and scores.grad[:, 0].all() and not scores.grad[:, 1].any()


def test_a_config_with_an_impossible_number_of_heads_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert started(reward_recipe()) == 0
    path = Path("rm/final/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "reward_heads": "two"}))
    task = {"name": "ranked", "metric": "reward", "data": [{"path": "pairs.jsonl"}]}
    assert started({"stage": "eval", "model": {"path": "rm/final"}, "tasks": [task], "output_dir": "e"}) == 2
    assert "reward_heads" in capsys.readouterr().err
