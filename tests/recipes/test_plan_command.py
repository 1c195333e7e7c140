"""`dsv2 plan`: what it says of released models, of chains and of wrong recipes, without weights, data or a network."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from conversations.sections import TrainingRecipe
from deepseek_v2_modeling import PRESETS, DeepseekV2Config, preset_config, released_config
from deepseek_v2_modeling.loading import LoraSettings, meta_model
from deepseek_v2_modeling.training import training_sizes
from recipes.cli import main
from recipes.plan.compute import flops_per_token
from recipes.plan.layouts import fits, smallest
from recipes.plan.load import Lengths, load_of
from recipes.plan.memory import Layout, memory
from recipes.recipe.loader import load_recipe, of_stage
from recipes.runs.foundation import Foundation

SHIPPED = Path(__file__).parents[2] / "recipes"
GB = 1e9
PAIRS = {"path": "tiny:helpful_train?n=8"}
REWARD = {"model": "${helpful}"}


def load(name: str, *overrides: str):
    recipe = of_stage(load_recipe(SHIPPED / f"{name}.yaml", list(overrides)), ["sft", "rl", "reward"]).recipe
    assert isinstance(recipe, TrainingRecipe)
    settings = sizes_of(recipe.model.path)
    return load_of(recipe, settings, Lengths(), Foundation())


def sizes_of(name: str) -> DeepseekV2Config:
    settings = released_config(name)
    assert settings is not None
    return settings


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", list(PRESETS))
def test_two_layers_stand_for_all(preset: str) -> None:
    settings = preset_config(preset)
    whole = sum(parameter.numel() for parameter in meta_model(settings, "causal_lm").parameters())
    assert training_sizes(settings, "causal_lm").total(lambda weight: weight.values) == whole


def test_quantised_weights_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their few bits, and with the values of the largest one in a layer's backward pass; the library plays no
    part."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    plain, quantised = (
        memory(load("v2/qlora", f"model.quantization={name}"), Layout(8), 80 * GB) for name in ("null", "nf4")
    )
    assert quantised.state["weights"] < 0.3 * plain.state["weights"]
    assert quantised.state["adapters"] == plain.state["adapters"]
    worst = "logits, or a layer's backward pass"
    gate_up_proj = 160 * (2 * 1536) * 5120
    assert quantised.update[worst] - plain.update[worst] == gate_up_proj * (2 + 0.5625)  # bf16, and a copy of the codes
    loads = [load("v2/qlora", f"model.quantization={name}") for name in ("null", "nf4")]
    counts = [flops_per_token(each.settings, each.sizes, 4096) for each in loads]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("deepseek-ai/DeepSeek-V2", 235_741_434_880),
        ("deepseek-ai/DeepSeek-V2-Lite", 15_706_484_224),
        ("deepseek-ai/DeepSeek-V3", 671_026_404_352),
        ("moonshotai/Moonlight-16B-A3B", 15_960_108_544),
        ("zai-org/GLM-4.7-Flash", 29_943_390_976),
        ("tencent/Youtu-LLM-2B", 1_961_560_064),
    ],
)
def test_released_models_have_as_many_weights_as_stated(name: str, weights: int) -> None:
    settings = sizes_of(name)
    sizes = training_sizes(settings, "causal_lm")
    assert sizes.total(lambda weight: weight.values) == weights
    assert sum(p.numel() for p in meta_model(settings, "causal_lm").parameters()) == weights


def test_adapters_are_counted_as_peft_makes_them() -> None:
    """V2 at rank 8: 18.8 GB of adapters, gradients and moments."""
    settings = sizes_of("deepseek-ai/DeepSeek-V2")
    lora = LoraSettings(("attention", "experts", "shared_experts"), r=8)
    sizes = training_sizes(settings, "causal_lm", lora, dtype="bfloat16")
    assert sizes.total(lambda weight: weight.trained) == 1_177_679_872


@pytest.mark.parametrize(
    ("name", "layout", "low", "high"),
    [
        ("v2_lite/sft_lora", Layout(), 36, 40),
        ("v2_lite/sft_full", Layout(8), 36, 50),
        ("v2/sft_lora", Layout(16), 45, 60),
        ("glm4_moe_lite/sft_lora", Layout(), 66, 80),
        ("youtu/sft_lora", Layout(), 6, 8),
    ],
)
def test_totals_of_shipped_recipes(name: str, layout: Layout, low: float, high: float) -> None:
    assert low <= memory(load(name), layout, 80 * GB).total / GB <= high


def test_more_gpus_never_take_more_memory_each() -> None:
    full = load("v2_lite/sft_full", "parallel=null")
    totals = [memory(full, Layout(gpus), 80 * GB).total for gpus in (8, 16, 32, 64, 128)]
    assert totals == sorted(totals, reverse=True)
    found = smallest(full, 40 * GB)
    assert found and fits(found, 40 * GB) and not fits(memory(full, Layout(found.layout.fsdp - 8), 40 * GB), 40 * GB)
    assert smallest(full, 5 * GB) is None


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    """A dense model, whose products torch counts; without the embedding, which is a look-up."""
    from torch.utils.flop_counter import FlopCounterMode

    from tests.helpers.models import small_config, small_model

    dense = {"n_routed_experts": None, "n_shared_experts": None, "first_k_dense_replace": 3, "aux_loss_alpha": 0.0}
    model, ids = small_model(**dense, attn_implementation="eager"), torch.arange(2, 34)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    settings, attended = small_config(**dense), 2 * ids.numel()  # eager attention computes what is masked, too
    ours = ids.numel() * flops_per_token(settings, training_sizes(settings, "causal_lm"), attended)
    assert ours == pytest.approx(3 * counter.get_total_flops(), rel=0.02)  # a backward pass takes twice a forward's


def test_v2_is_planned_from_its_config_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, SHIPPED / "v2" / "sft_lora.yaml", "parallel=null", "--gpu-gb", "141")
    assert "237 billion" in text and "does not fit on one GPU" in text
    assert re.search(r"fits on \d+ GPUs: parallel: \{fsdp: \d+", text), text
    assert "its rows were not counted" in text  # they are on the hub


def test_a_chain_is_planned_stage_by_stage(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = {"path": "runs/tiny/base", "preset": "tiny"}
    stages = [
        {"name": "sft", "recipe": "tiny/sft", "data": [{"path": "tiny:sft_train?n=8"}]},
        {"name": "eval_sft", "recipe": "tiny/eval", "model": {"path": "${sft}"}, "results": "stages.sft"},
        {"name": "helpful", "recipe": "tiny/reward_helpful", "model": {"path": "${sft}"}, "data": [PAIRS]},
        {"name": "rl", "recipe": "tiny/rl_preference", "model": {"path": "${sft}"}, "rewards": [REWARD]},
    ]
    chain = {"stage": "chain", "model": model, "stages": stages, "output_dir": "runs/chain"}
    (tmp_path / "chain.yaml").write_text(json.dumps(chain))  # JSON is YAML
    text = said(capsys, tmp_path / "chain.yaml")
    assert "eval_sft: eval trains nothing" in text
    assert text.count("fits: ") == 3 and "reference model" in text and "rewards.0.model" in text
    assert "the run: 700 steps" in text
    assert not (tmp_path / "runs" / "tiny" / "base").exists()  # no model was made


def test_check_prints_the_total(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(SHIPPED / "tiny" / "sft.yaml"), "data=[{path: 'tiny:sft_train?n=8'}]"]) == 0
    assert re.search(r"memory: fits: 0\.\d+ GB", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--gpu-gb", "0"], "--gpu-gb is 0"),
        (["--mfu", "1.5"], "--mfu is 1.5"),
        (["--gpu-tflops", "nan"], "--gpu-tflops is nan"),
        (["model.path=nowhere"], "nowhere"),
        (["training.lerning_rate=1"], "learning_rate"),
    ],
)
def test_what_is_wrong_is_one_message(words: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(SHIPPED / "v2_lite" / "sft_lora.yaml"), *words]) == 2
    assert fault in capsys.readouterr().err
