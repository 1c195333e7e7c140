"""Model directories: the hub's layout in and out, stock transformers, Auto classes, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as stock

from deepseek_v2_modeling import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2Model,
    ModelError,
)
from deepseek_v2_modeling.loading import load_base

from ..helpers.models import REFERENCE, SMALL, logits_of, random_ids, small_config, small_model, stock_twin

VARIANTS = {
    "greedy, no q_lora": {"topk_method": "greedy", "n_group": None, "topk_group": None},
    "grouped, q_lora": {"q_lora_rank": 12},
    "value wider than key": {"v_head_dim": 16},
    "one shared": {"n_shared_experts": 1},
    "biases": {"attention_bias": True, "q_lora_rank": 12},
}
EXPERT = re.compile(r"^model\.layers\.[12]\.mlp\.experts\.\d\.(gate|up|down)_proj\.weight$")


def names_on_disk(directory: Path) -> set[str]:
    found: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_model().save_pretrained(tmp_path)
    return tmp_path


# Layout


@pytest.mark.parametrize("name", ["lite", "full"])
def test_names_are_those_of_the_hub(tmp_path: Path, name: str):
    """Read and written again, a released checkpoint has the same names and the same numbers."""
    DeepseekV2ForCausalLM.from_pretrained(REFERENCE / name).save_pretrained(tmp_path)
    released, again = load_file(REFERENCE / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(again) == set(released)
    assert all(torch.equal(again[key], released[key]) for key in released)


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_round_trip(tmp_path: Path, shard_size: str):
    model = small_model(q_lora_rank=12)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard_size == "50GB"
    names = names_on_disk(tmp_path)
    experts = 2 * SMALL["n_routed_experts"] * 3
    assert len([name for name in names if EXPERT.match(name)]) == experts
    assert not any("gate_up_proj" in name or name.endswith(".experts.down_proj") for name in names)

    again = load_base(str(tmp_path)).state_dict()
    wanted = model.state_dict()
    assert set(again) == set(wanted)
    assert all(torch.equal(again[key], wanted[key]) for key in wanted)


def test_bfloat16_round_trip(tmp_path: Path):
    model = small_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = load_base(str(tmp_path), dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in again.state_dict().items())
    assert load_base(str(tmp_path)).dtype == torch.float32


# Stock transformers


@pytest.mark.parametrize("variant", VARIANTS)
def test_to_stock_and_back(tmp_path: Path, variant: str):
    model, ids = small_model(**VARIANTS[variant]), random_ids(2, 30)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == (9 if variant == "biases" else 0)
    for bias in biases:
        torch.nn.init.normal_(bias)
    model.save_pretrained(tmp_path / "ours")
    twin = stock_twin(tmp_path / "ours")
    assert type(twin) is stock.DeepseekV2ForCausalLM
    torch.testing.assert_close(logits_of(twin, ids), logits_of(model, ids), rtol=0, atol=1e-5)

    twin.save_pretrained(tmp_path / "stock")
    back = load_base(str(tmp_path / "stock")).eval()
    assert torch.equal(logits_of(back, ids), logits_of(model, ids))


def test_score_model_in_stock(tmp_path: Path):
    model, ids = small_model(DeepseekV2ForSequenceClassification, num_labels=1, pad_token_id=1), random_ids(2, 12)
    model.save_pretrained(tmp_path)
    twin = stock_twin(tmp_path, stock.DeepseekV2ForSequenceClassification)
    torch.testing.assert_close(logits_of(twin, ids), logits_of(model, ids), rtol=0, atol=1e-5)


def test_tied_embeddings(tmp_path: Path):
    model, ids = small_model(tie_word_embeddings=True), random_ids(1, 8)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in names_on_disk(tmp_path)
    again = load_base(str(tmp_path)).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


# Auto classes


def test_auto_classes(saved: Path):
    assert type(AutoConfig.from_pretrained(saved)) is DeepseekV2Config
    assert type(AutoModel.from_pretrained(saved)) is DeepseekV2Model
    assert type(AutoModelForCausalLM.from_pretrained(saved)) is DeepseekV2ForCausalLM
    score = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1)
    assert type(score) is DeepseekV2ForSequenceClassification
    assert type(AutoModelForCausalLM.from_config(small_config())) is DeepseekV2ForCausalLM


def test_auto_classes_of_a_released_config():
    """Its auto_map names modules that are not there; ours are taken without asking."""
    assert "auto_map" in json.loads((REFERENCE / "lite" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(REFERENCE / "lite")
    assert type(model) is DeepseekV2ForCausalLM
    direct = DeepseekV2ForCausalLM.from_pretrained(REFERENCE / "lite").state_dict()
    assert all(torch.equal(value, direct[key]) for key, value in model.state_dict().items())


def test_random_model_has_the_configs_spread():
    """No parameter is left as it came from the allocator: experts and router are drawn like the rest."""
    for name, parameter in small_model(hidden_size=64, initializer_range=0.3).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.3, rel=0.2), name


# Faults in the weights


def edit(directory: Path, drop: str | None = None, put: dict[str, torch.Tensor] | None = None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if drop:
        del tensors[drop]
    save_file(tensors | (put or {}), path, metadata={"format": "pt"})


PLACES = [
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.shared_experts.down_proj.weight",
    "model.layers.1.mlp.experts.3.gate_proj.weight",
    "model.layers.2.mlp.experts.7.down_proj.weight",
]


def fault(directory: Path, head: Literal["causal_lm", "score"] = "causal_lm") -> str:
    with pytest.raises(ModelError) as caught:
        load_base(str(directory), head=head)
    assert str(directory) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PLACES)
def test_missing_tensor(saved: Path, name: str):
    edit(saved, drop=name)
    message = fault(saved)
    assert "missing" in message and name in message


@pytest.mark.parametrize("name", PLACES)
def test_misshapen_tensor(saved: Path, name: str):
    edit(saved, put={name: torch.zeros(3, 5)})
    message = fault(saved)
    assert "misshapen" in message and name in message and "[3, 5]" in message


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj.weight", "model.extra.weight", "head.weight"])
def test_unexpected_tensor(saved: Path, name: str):
    edit(saved, put={name: torch.zeros(2, 2)})
    message = fault(saved)
    assert "unexpected" in message and name in message


def test_all_experts_of_a_layer_missing(saved: Path):
    for expert in range(SMALL["n_routed_experts"]):
        for part in ("gate", "up", "down"):
            edit(saved, drop=f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight")
    message = fault(saved)
    assert "missing" in message and "model.layers.1.mlp.experts" in message


@pytest.mark.parametrize("experts", [4, 16])
def test_another_number_of_experts_in_the_config(saved: Path, experts: int):
    """E.g. the config of another checkpoint beside the weights."""
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "n_routed_experts": experts, "topk_group": 4}))
    assert "mlp.experts" in fault(saved)


def test_score_model_is_checked_too(saved: Path):
    edit(saved, drop="model.layers.1.mlp.experts.3.gate_proj.weight")
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in fault(saved, head="score")


def test_score_head_may_be_new_and_lm_head_may_be_left(saved: Path):
    model = load_base(str(saved), head="score")
    assert type(model) is DeepseekV2ForSequenceClassification
    assert model.score.weight.shape == (1, SMALL["hidden_size"])
    causal = load_base(str(saved))
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, causal.model.layers[1].mlp.experts.down_proj)


def test_saved_score_head_is_loaded(tmp_path: Path):
    model = small_model(DeepseekV2ForSequenceClassification, num_labels=1)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_base(str(tmp_path), head="score").score.weight, model.score.weight)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load_base(str(tmp_path))


# Faults in the directory


def test_settings_of_load_base(saved: Path):
    assert load_base(str(saved), config={"aux_loss_alpha": 0.5}).config.aux_loss_alpha == 0.5
    for wrong, named in (
        ({"aux_los_alpha": 0.5}, "aux_los_alpha"),
        ({"aux_loss_alpha": "much"}, "aux_loss_alpha"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
    ):
        with pytest.raises(ModelError, match=f"model.config: .*{named}"):
            load_base(str(saved), config=wrong)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"scoring_func": "sigmoid"}, "sigmoid"),
        ({"hidden_size": "big"}, "hidden_size"),
    ],
)
def test_wrong_config(saved: Path, change: dict[str, Any], named: str):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **change}))
    assert named in fault(saved)


def test_broken_config(saved: Path):
    (saved / "config.json").write_text("{")
    fault(saved)
