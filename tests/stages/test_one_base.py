"""Reward models that are adapters of the policy's base run on its weights: one copy of them is in memory."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversations.errors import ToolkitError
from conversations.rewards.model import RewardModelReward
from deepseek_v2_modeling.adapters.shared_base import base_weights
from deepseek_v2_modeling.inference import score_heads
from deepseek_v2_modeling.loading import (
    LoraSettings,
    load_model,
    prepare_trainable,
    reason_not_to_share,
    resolve_source,
)
from recipes.cli import main
from recipes.runs.devices import check_device, devices
from recipes.runs.new_model import make_model

from ..helpers.rl import Vowels, run
from ..helpers.stages import byte_tokenizer, chat_model, weights

POLICY = LoraSettings(("attention", "experts"), 4, 8)
JUDGE = LoraSettings(("attention", "experts", "shared_experts"), 2, 4)
ROWS = [[0, 70 + i, 71, 72, *range(80, 85 + 3 * i)] for i in range(5)]


def base(folder: Path, **changes: Any) -> Path:
    chat_model(seed=3, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def judge(folder: Path, on: Path, seed: int, lora: LoraSettings | None = JUDGE) -> Path:
    """A reward model that does something, as its stage leaves it."""
    model = prepare_trainable(resolve_source(on), lora=lora, merge_dir=folder / "merged", head="score")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "score" in name:
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(str(folder))
    byte_tokenizer().save_pretrained(folder)
    return folder


def scores(model: Any) -> torch.Tensor:
    return torch.tensor(score_heads(model, ROWS, pad_token_id=2))


def new_policy(on: Path, folder: Path) -> Any:
    torch.manual_seed(0)
    return prepare_trainable(resolve_source(on), lora=POLICY, merge_dir=folder / "unused")


def test_scores_and_training_are_those_of_models_of_their_own(tmp_path):
    on = base(tmp_path / "base")
    sources = [resolve_source(judge(tmp_path / f"judge_{seed}", on, seed)) for seed in (1, 2)]
    policy, alone = new_policy(on, tmp_path), [load_model(source, head="score") for source in sources]
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert all(reason_not_to_share(policy, source, "float32") is None for source in sources)
    together = [load_model(source, head="score", on=policy) for source in sources]
    shared = base_weights(policy)
    for model in together:
        own = base_weights(model)
        assert own.keys() == shared.keys() and all(own[name] is weight for name, weight in shared.items())
        extra = {name for name, p in model.named_parameters() if not any(p is weight for weight in shared.values())}
        assert extra and all("lora_" in name or "score" in name for name in extra)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    wanted = [scores(model) for model in alone]
    assert not torch.allclose(*wanted, atol=1e-2)
    for model, found in zip(together, wanted, strict=True):
        torch.testing.assert_close(scores(model), found, atol=1e-5, rtol=0)
    start = {name: value.clone() for name, value in shared.items()}
    runs = {}
    for name, models, trainee in (("alone", alone, new_policy(on, tmp_path)), ("together", together, policy)):
        rewards = [Vowels("v"), *(RewardModelReward(f"r{i}", m, byte_tokenizer()) for i, m in enumerate(models))]
        run(tmp_path / name, model=trainee, rewards=rewards, training={"max_steps": 2, "save_strategy": "no"})
        runs[name] = {key: value for key, value in weights(trainee).items() if "lora_" in key}
    assert [name for name, parameter in policy.named_parameters() if parameter.requires_grad] == trained
    assert runs["alone"].keys() == runs["together"].keys()
    for name, value in runs["alone"].items():
        torch.testing.assert_close(runs["together"][name], value, atol=1e-6, rtol=0, msg=name)
    assert all(torch.equal(shared[name], value) for name, value in start.items())
    for model, found in zip(together, wanted, strict=True):
        torch.testing.assert_close(scores(model), found, atol=1e-5, rtol=0)


def test_what_cannot_share_says_why(tmp_path):
    on, other = base(tmp_path / "base"), base(tmp_path / "other")
    source = resolve_source(judge(tmp_path / "judge", on, 1))
    policy = new_policy(on, tmp_path)
    reasons = {
        "another base, ": (new_policy(other, tmp_path), source, "float32"),
        "trains the weights": (
            prepare_trainable(resolve_source(on), lora=None, merge_dir=tmp_path / "unused"),
            source,
            "float32",
        ),
        "base is in float32": (policy, source, "bfloat16"),
        "a full model": (policy, replace(source, adapter=None), "float32"),
    }
    for reason, arguments in reasons.items():
        assert reason in (reason_not_to_share(*arguments) or "nothing")
    tensors = load_file(tmp_path / "judge" / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(4, 4)
    save_file(tensors, tmp_path / "judge" / "adapter_model.safetensors")
    with_embeddings = resolve_source(tmp_path / "judge")
    assert "embeddings of its own" in (reason_not_to_share(policy, with_embeddings, "float32") or "nothing")


def test_runs_say_which_models_share(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(Path("base"), "tiny", 0)
    training = {"max_steps": 1, "per_device_train_batch_size": 2}
    reward = {
        "stage": "reward",
        "model": {"path": "base"},
        "lora": {"targets": ["attention"], "r": 2},
        "data": [{"path": "tiny:helpful_train?n=4"}],
        "training": training,
        "output_dir": "judge",
    }
    Path("reward.yaml").write_text(json.dumps(reward), encoding="utf-8")
    assert main(["reward", "reward.yaml"]) == 0
    rl = {
        "stage": "rl",
        "model": {"path": "base"},
        "lora": {"targets": ["attention", "experts"], "r": 2},
        "data": [{"path": "tiny:rl_preference"}],
        "rewards": [{"model": "judge"}],
        "training": {**training, "num_generations": 2, "max_completion_length": 4},
        "output_dir": "rl",
    }
    Path("rl.yaml").write_text(json.dumps(rl), encoding="utf-8")
    assert main(["rl", "rl.yaml"]) == 0
    said = "".join(capsys.readouterr())
    assert "rewards.0.model: runs on the weights of this stage's base, " in said, [
        x for x in said.splitlines() if "rewards.0" in x
    ]
    assert main(["rl", "rl.yaml", "lora=null", "output_dir=full"]) == 0
    said = "rewards.0.model: has weights of its own in memory: this stage trains the weights of its base"
    assert said in "".join(capsys.readouterr())
    elsewhere = ["rl.yaml", "rewards.0.device=cpu", "output_dir=elsewhere"]
    assert main(["check", *elsewhere]) == main(["rl", *elsewhere]) == 0
    said = "rewards.0.model: has weights of its own in memory: it runs on a device of its own, cpu"
    assert said in "".join(capsys.readouterr())
    assert (Path("rl", "samples.jsonl")).read_text() == (Path("elsewhere", "samples.jsonl")).read_text()
    for command in ("check", "rl"):
        assert main([command, "rl.yaml", "rewards.0.device=cuda:99", "output_dir=nowhere"]) == 2
        assert 'rewards.0.device: "cuda:99" is not on this machine, which has cpu' in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_a_reward_model_stays_on_its_device():
    moved = []
    model = SimpleNamespace(to=moved.append, config=SimpleNamespace(num_labels=1))
    RewardModelReward("here", model, byte_tokenizer()).move("cuda:0")
    RewardModelReward("there", model, byte_tokenizer(), device="cpu").move("cuda:0")
    assert moved == ["cuda:0", "cpu"]


def test_the_devices_are_those_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert devices() == ["cpu", "cuda", "cuda:0", "cuda:1"]
    with pytest.raises(ToolkitError, match=r'"cuda:2" is not on this machine, which has cpu, cuda, cuda:0, cuda:1'):
        check_device("rewards.0.device", "cuda:2")
