"""Stages on a quantised base, by the command line: sft, reward and rl, resumed, merged and refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepseek_v2_modeling import DeepseekV2ForCausalLM
from deepseek_v2_modeling.layers.quantization import quantization_of
from deepseek_v2_modeling.loading import load_base, resolve_source
from deepseek_v2_modeling.training import training_sizes
from recipes.cli import main
from recipes.runs.new_model import make_model

from ..helpers.sharded_launch import stopped_at
from ..helpers.stages import lines

pytest.importorskip("bitsandbytes")
MODEL = {"path": "base", "quantization": "nf4"}
LORA = {"targets": ["attention", "experts", "shared_experts", "dense"], "r": 2}
TRAINING = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_steps": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "sft": {"data": [{"path": "tiny:sft_train?n=16"}], "training": {**TRAINING, "logging_steps": 1}},
    "reward": {"data": [{"path": "tiny:helpful_train?n=8"}], "training": {**TRAINING, "max_steps": 1}},
    "rl": {
        "model": {**MODEL, "path": "sft"},
        "data": [{"path": "tiny:rl_preference?n=8"}],
        "rewards": [{"model": "reward"}],
        "training": {**TRAINING, "max_steps": 1, "beta": 0.1, "num_generations": 2, "max_completion_length": 4},
    },
    "eval": {
        "model": {**MODEL, "path": "sft"},
        "tasks": [{"name": "text", "metric": "loss", "data": [{"path": "tiny:sft_train?n=4"}]}],
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("quantized")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sft.stage.SAMPLE_TOKENS", 2)
        make_model(Path("base"), "tiny", 0)
        for stage, sections in RECIPES.items():
            trained = {"lora": LORA} if stage != "eval" else {}
            recipe = {"stage": stage, "model": MODEL, **trained, **sections, "output_dir": stage}
            Path(f"{stage}.yaml").write_text(json.dumps(recipe))
        assert main(["sft", "sft.yaml"]) == 0
        yield folder


def test_a_stopped_run_goes_on_as_if_it_had_not_been(world: Path):
    stopped_at(2, world / "sft", world / "again")
    assert main(["sft", "sft.yaml", "output_dir=again"]) == 0
    first, second = ([line["loss"] for line in lines(world / run / "metrics.jsonl") if "loss" in line]
                     for run in ("sft", "again"))  # fmt: skip
    assert len(first) == 4 and second == first
    tensors, others = (load_file(world / run / "final/adapter_model.safetensors") for run in ("sft", "again"))
    assert all(torch.equal(others[name], tensor) for name, tensor in tensors.items())
    assert main(["sft", "sft.yaml", "output_dir=again", "model.quantization=int8"]) == 2


def test_the_merge_is_of_the_original(world: Path):
    assert main(["merge", "sft", "merged"]) == 0
    base, merged = (load_file(world / name / "model.safetensors") for name in ("base", "merged"))
    assert base.keys() == merged.keys()
    same = {name for name, tensor in base.items() if torch.equal(merged[name], tensor)}
    assert "model.embed_tokens.weight" in same and not any("self_attn.o_proj" in name for name in same)
    assert quantization_of(DeepseekV2ForCausalLM.from_pretrained(world / "merged")) is None


def test_the_export_is_that_of_the_adapter(world: Path):
    assert main(["export", "sft", "exported", "--kv-b"]) == 0
    adapter, exported = (load_file(world / name / "adapter_model.safetensors") for name in ("sft/final", "exported"))
    kept = {name for name in adapter if ".experts." not in name}
    assert kept and all(torch.equal(exported[name], adapter[name]) for name in kept)
    assert any(".experts.0.gate_proj.lora_A" in name for name in exported)
    assert main(["import", "exported", "imported"]) == 0
    imported = load_file(world / "imported" / "adapter_model.safetensors")
    assert imported.keys() == adapter.keys() and all(torch.equal(imported[name], adapter[name]) for name in adapter)


def test_a_stage_of_a_chain_is_quantised_by_its_own_key(world: Path, capsys: pytest.CaptureFixture[str]):
    """The chain's model may be trained as a whole by other stages."""
    stage = {"name": "one", "recipe": "sft.yaml", "model": {"quantization": "int8"}, "training": {"max_steps": 1}}
    recipe = {"stage": "chain", "model": {"path": "base"}, "stages": [stage], "output_dir": "chain"}
    Path("chain.yaml").write_text(json.dumps(recipe))
    assert main(["run", "chain.yaml", "model.quantization=int8"]) == 2
    assert 'unknown key "model.quantization"' in capsys.readouterr().err
    assert main(["run", "chain.yaml"]) == 0
    assert "quantization: int8" in Path("chain/one/recipe.yaml").read_text()


def test_reward_models_and_the_reference_stand_on_one_base(world: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["reward", "reward.yaml", "model.path=sft"]) == 0
    assert main(["rl", "rl.yaml"]) == 0
    assert "rewards.0.model: runs on the weights of this stage's base" in "".join(capsys.readouterr())
    logged = next(line for line in lines(world / "rl" / "metrics.jsonl") if "kl" in line)
    assert logged["reward"] != 0 and logged["kl"] == pytest.approx(0, abs=1e-6)  # the reference is where it began


def test_an_evaluation_may_be_quantised_too(world: Path):
    losses = []
    for words in ([], ["model.quantization=null", "output_dir=plain"]):
        assert main(["eval", "eval.yaml", *words]) == 0
        results = json.loads((world / ("plain" if words else "eval") / "results.json").read_text())
        losses.append(results["text_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.2) and losses[0] != losses[1]


@pytest.mark.parametrize("quantization", ["nf4", "int8", None])
def test_the_plan_counts_the_bytes_of_weights(world: Path, quantization: Any):
    source = resolve_source("base")
    model = load_base("base", dtype="bfloat16", quantization=quantization)
    sizes = training_sizes(source.settings, "causal_lm", None, dtype="bfloat16", quantization=quantization)
    trained = {w.module for w in sizes.weights if w.trained}  # all but quantised ones, in float32
    held = sizes.total(lambda w: w.values * (2 if w.trained else w.itemsize))
    assert trained and held == sum(parameter.nbytes for parameter in model.parameters())
    plain = training_sizes(source.settings, "causal_lm", None)
    assert sizes.total(lambda w: w.values) == plain.total(lambda w: w.values)


def test_what_check_and_run_refuse(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for words, said in (
        (["sft.yaml", "lora=null"], "model.quantization: nf4 is for training adapters: give lora"),
        (["rl.yaml", "training.use_vllm=true"], "use_vllm cannot be combined with model.quantization"),
        (["sft.yaml", "model.quantization=fp4"], "model.quantization"),
    ):
        for command in ("check", words[0].removesuffix(".yaml")):
            assert main([command, *words, "output_dir=refused"]) == 2
            assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for command in ("check", "sft"):
        assert main([command, "sft.yaml", "output_dir=refused"]) == 2
        assert "quantization nf4 needs bitsandbytes, which is not installed: pip install" in capsys.readouterr().err
    assert not (world / "refused").exists()
