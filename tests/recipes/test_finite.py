"""A number that is not finite, anywhere in a model's or an adapter's files, is one error that names it."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sft.stage
from deepseek_v2_modeling.checkpoints.finite import is_finite
from recipes.cli import main
from recipes.runs.new_model import make_model

SFT: dict[str, Any] = {
    "stage": "sft",
    "model": {"path": "base"},
    "data": [{"path": "tiny:sft_train?n=4"}],
    "lora": {"targets": ["attention", "experts"], "r": 2},
    "training": {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 64, "save_strategy": "no"},
    "output_dir": "run",
}
EVAL: dict[str, Any] = {
    "stage": "eval",
    "model": {"path": "base"},
    "tasks": [{"name": "loss", "metric": "loss", "data": [{"path": "tiny:sft_train?n=2"}]}],
    "output_dir": "figures",
}
CHAT = ("chat", "base", "--prompt", "1?", "--max-new-tokens", "2")
# What nobody adapts here, and what is adapted; an expert is named by its own number.
WEIGHTS = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.1.mlp.experts.3.up_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "lm_head.weight",
)


@pytest.fixture(scope="module")
def base_and_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter run on it."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sft.stage, "SAMPLE_TOKENS", 1)
        make_model(Path("base"), "tiny", 0)
        Path("sft.yaml").write_text(json.dumps(SFT), encoding="utf-8")
        Path("eval.yaml").write_text(json.dumps(EVAL), encoding="utf-8")
        assert main(["sft", "sft.yaml"]) == 0
        reward = ("stage=reward", "data=[{path: 'tiny:helpful_train?n=4'}]", "output_dir=judge", "lora=null")
        assert main(["reward", "sft.yaml", *reward]) == 0
    return folder


@pytest.fixture
def dsv2(
    base_and_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs a command that must end with 2; the line it says."""
    shutil.copytree(base_and_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    config = Path("run/final/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))

    def refused(*words: str) -> str:
        capsys.readouterr()
        assert main([*words]) == 2, words
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return refused


def spoil(file: str, name: str, value: float = math.nan) -> None:
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_the_base(dsv2: Callable[..., str], name: str) -> None:
    spoil("base/model.safetensors", name, math.inf if "mlp" in name else math.nan)
    for words in (CHAT, ("eval", "eval.yaml"), ("sft", "sft.yaml", "output_dir=next"), ("merge", "run", "merged")):
        line = dsv2(*words)
        assert name in line and "contains NaN or infinite values" in line and "base" in line
    assert "contains NaN or infinite values" in dsv2("chat", "run", "--prompt", "1?")
    assert not Path("merged").exists() and not Path("next/final").exists()


def test_a_score_head_and_a_factor(dsv2: Callable[..., str]) -> None:
    spoil("judge/final/model.safetensors", "score.weight")
    pairs = "tasks=[{name: p, metric: pair_accuracy, data: [{path: 'tiny:helpful_train?n=2'}]}]"
    assert "score.weight (float32) contains NaN" in dsv2("eval", "eval.yaml", "model.path=judge", pairs)
    weights = "run/final/adapter_model.safetensors"
    name = min(load_file(weights))
    spoil(weights, name)
    for words in (("chat", "run", "--prompt", "1?"), ("merge", "run", "out"), ("export", "run", "out", "--kv-b")):
        assert f"{name} contains NaN or infinite values" in dsv2(*words)
    assert not Path("out").exists()


@pytest.mark.parametrize("key", ["lora_alpha", "alpha_pattern"])
def test_scaling_of_an_adapter(dsv2: Callable[..., str], key: str) -> None:
    path = Path("run/final/adapter_config.json")
    config = json.loads(path.read_text())
    config[key] = {"q_proj": math.inf} if isinstance(config[key], dict) else math.nan
    path.write_text(json.dumps(config))
    for words in (("chat", "run", "--prompt", "1?"), ("merge", "run", "out"), ("export", "run", "out", "--kv-b")):
        line = dsv2(*words)
        assert str(path) in line and key in line and "finite" in line


@pytest.mark.parametrize("key", ["routed_scaling_factor", "rms_norm_eps", "rope_theta"])
def test_settings_of_a_model(dsv2: Callable[..., str], key: str) -> None:
    path = Path("base/config.json")
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    path.write_text(json.dumps({**config, key: math.nan}))
    for words in (CHAT, ("merge", "run", "out")):
        line = dsv2(*words)
        assert key in line and "nan: it must be a finite number" in line


def test_statistics_of_a_reward_model(dsv2: Callable[..., str]) -> None:
    rl = {**SFT, "stage": "rl", "data": [{"path": "tiny:rl_reasoning?n=4"}], "rewards": [{"model": "judge"}]}
    rl["training"] = {"max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2}
    Path("rl.yaml").write_text(json.dumps({**rl, "output_dir": "policy"}))
    path = Path("judge/final/reward_stats.json")
    for text in ('{"mean": NaN, "std": 1, "n": 2}', "{", "[1]", '{"mean": 0}'):
        path.write_text(text)
        assert str(path) in dsv2("rl", "rl.yaml")


def test_finite_weights_that_overflow(dsv2: Callable[..., str]) -> None:
    """No empty answer with exit code 0, no figure made of NaN."""
    tensors = load_file("base/model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    tensors["lm_head.weight"].fill_(3e38)
    save_file(tensors, "base/model.safetensors", metadata={"format": "pt"})
    answers = "tasks=[{name: a, metric: refusal, data: [{path: 'tiny:sft_train?n=2'}]}]"
    for words in (CHAT, ("eval", "eval.yaml"), ("eval", "eval.yaml", answers)):
        assert "the model's logits are not finite" in dsv2(*words)


NUMBERS = st.floats(width=16) | st.just(65504.0) | st.just(-65504.0)


@given(st.lists(NUMBERS, max_size=40), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_is_finite_is_isfinite(numbers: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(numbers, dtype=dtype)
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


def test_large_finite_numbers_are_finite() -> None:
    assert is_finite(torch.full((4,), 3e38)) and is_finite(torch.full((4,), 3e38, dtype=torch.bfloat16))
    assert is_finite(torch.tensor([], dtype=torch.float32)) and is_finite(torch.tensor([3, 4]))
