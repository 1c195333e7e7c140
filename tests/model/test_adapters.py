"""Saved adapters loaded again: every tensor finds its place, or an error names it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from deepseek_v2_modeling import ModelError, apply_lora, export_adapter, load_adapter, lora_config
from deepseek_v2_modeling.checkpoints.adapter_config import read_adapter_config
from deepseek_v2_modeling.loading import (
    LoraSettings,
    ModelSource,
    load_base,
    load_model,
    prepare_trainable,
    read_adapter,
    save_directory,
)

from ..helpers.models import logits_of, random_adapter, random_ids, small_model, tokenizer

EVERYWHERE = ("attention", "experts", "shared_experts", "dense", "router")
LORA = LoraSettings(targets=EVERYWHERE, r=2, alpha=3)
EXPERT_B = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    small_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """As SFT leaves it: adapter and tokenizer."""
    save_directory(random_adapter(load_base(str(base)), LORA.config("CAUSAL_LM")), tokenizer(), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(directory: Path, **changes: Any) -> None:
    """drop: a tensor's name. put: {name: tensor}."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(changes.get("drop"), None)
    save_file(tensors | changes.get("put", {}), path, metadata={"format": "pt"})


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in get_peft_model_state_dict(model).items() if "lora_" in name}


# Round trip


@pytest.mark.parametrize("targets", [EVERYWHERE, ("experts", "embeddings", "lm_head")])
def test_round_trip(base: Path, tmp_path: Path, targets: tuple[str, ...]):
    model = random_adapter(load_base(str(base)), lora_config(targets, r={t: i + 1 for i, t in enumerate(targets)}))
    model.save_pretrained(tmp_path / "again")
    loaded = load_adapter(load_base(str(base)), tmp_path / "again", trainable=False).eval()
    wanted, found = factors(model), factors(loaded)
    assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)
    ids = random_ids(2, 8)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_trainable(base: Path, adapter: Path):
    model = load_adapter(load_base(str(base), dtype="bfloat16"), adapter, trainable=True, dropout=0.5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    ids = random_ids(1, 8)
    assert not torch.equal(logits_of(model.train(), ids), logits_of(model, ids))


# Coverage


def test_missing_tensor(base: Path, adapter: Path):
    edit(adapter, drop=EXPERT_B)
    with pytest.raises(ModelError, match="missing") as caught:
        load_model(ModelSource(str(base), read_adapter(adapter)))
    assert EXPERT_B in str(caught.value) and str(adapter) in str(caught.value)


@pytest.mark.parametrize("extra", ["base_model.model.model.layers.9.mlp.gate.lora_A.weight", "something.else"])
def test_extra_tensor(base: Path, adapter: Path, extra: str):
    edit(adapter, put={extra: torch.zeros(2, 2)})
    with pytest.raises(ModelError, match="unexpected") as caught:
        load_model(ModelSource(str(base), read_adapter(adapter)))
    assert extra in str(caught.value)


def test_misshapen_tensor(base: Path, adapter: Path):
    edit(adapter, put={EXPERT_B: load_file(adapter / "adapter_model.safetensors")[EXPERT_B].t().contiguous()})
    with pytest.raises(ModelError, match="shape") as caught:
        load_model(ModelSource(str(base), read_adapter(adapter)))
    assert EXPERT_B in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"n_routed_experts": 16},
        {"hidden_size": 64},
        {"q_lora_rank": 12},
    ],
)
def test_adapter_of_another_model(tmp_path: Path, adapter: Path, changes: dict[str, Any]):
    small_model(**changes).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=re.escape(str(adapter))):
        load_model(ModelSource(str(tmp_path / "other"), read_adapter(adapter)))


def test_another_rank_in_the_config(base: Path, adapter: Path):
    config = read_adapter_config(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(ModelError, match="shape"):
        load_model(ModelSource(str(base), read_adapter(adapter)))


def test_unusable_directories(tmp_path: Path, adapter: Path):
    for text, named in (("{", "adapter_config.json"), (None, "adapter_config.json")):
        directory = tmp_path / f"wrong-{text}"
        directory.mkdir()
        if text:
            (directory / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match=named):
            read_adapter_config(directory)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        read_adapter_config(adapter)


@pytest.mark.parametrize("size", [0, 5, 400, -1])
def test_a_file_cut_short(base: Path, adapter: Path, size: int):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    for use in (
        lambda: load_adapter(load_base(str(base)), adapter),
        lambda: read_adapter(adapter),
    ):
        with pytest.raises(ModelError, match=re.escape(f"{path}: not a readable safetensors file")):
            use()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_numbers_that_are_not_finite(base: Path, adapter: Path, value: float):
    tensor = load_file(adapter / "adapter_model.safetensors")[EXPERT_B]
    tensor[0, 0] = value
    edit(adapter, put={EXPERT_B: tensor})
    with pytest.raises(ModelError, match=re.escape(f"{adapter}: {EXPERT_B} contains NaN or infinite")):
        load_adapter(load_base(str(base)), adapter)


# PEFT's own loading


def test_peft_loads_what_fits(base: Path, adapter: Path):
    loaded = PeftModel.from_pretrained(load_base(str(base)), adapter)
    ids = random_ids(2, 8)
    assert torch.equal(
        logits_of(loaded.eval(), ids), logits_of(load_model(ModelSource(str(base), read_adapter(adapter))), ids)
    )
    loaded.load_adapter(str(adapter), "second")
    loaded.load_state_dict({"base_model.model.model.norm.weight": torch.ones(32)}, strict=False)  # of no adapter


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"drop": EXPERT_B}, "missing tensors: .*experts.base_layer.lora_B"),
        (
            {"put": {EXPERT_B.replace("layers.1", "layers.9"): torch.zeros(2, 2)}},
            r"unexpected tensors: .*layers\.9\.mlp\.experts",
        ),
        ({"put": {"base_model.model.something.else": torch.zeros(2)}}, r"unexpected tensors: something\.else"),
    ],
)
def test_peft_does_not_load_half(base: Path, adapter: Path, changes: dict[str, Any], named: str):
    edit(adapter, **changes)
    with pytest.raises(ModelError, match=named):
        PeftModel.from_pretrained(load_base(str(base)), adapter)


def test_peft_does_not_load_pairs_of_each_expert(base: Path, adapter: Path, tmp_path: Path):
    export_adapter(adapter, tmp_path / "served", kv_b=True)
    with pytest.raises(ModelError, match=r"unexpected tensors: .*dsv2 import"):
        PeftModel.from_pretrained(load_base(str(base)), tmp_path / "served")


def test_adapted_embeddings_are_saved_without_a_warning(base: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    save_directory(apply_lora(load_base(str(base)), lora_config("lm_head", r=2)), tokenizer(), tmp_path / "adapter")
    load_adapter(load_base(str(base)), tmp_path / "adapter")
    assert not [w for w in recwarn if "save_embedding_layers" in str(w.message)]
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter/adapter_model.safetensors")


# From SFT to a reward model


def test_reward_model_starts_from_the_sft_adapter(base: Path, adapter: Path, tmp_path: Path):
    source = ModelSource(str(base), read_adapter(adapter))
    sft = load_model(source)
    model = prepare_trainable(source, lora=LORA, merge_dir=tmp_path / "merged", head="score")
    assert not (tmp_path / "merged").exists()
    assert isinstance(model, PeftModel) and type(model).__name__ == "PeftModelForSequenceClassification"
    wanted, found = factors(sft), factors(model)
    assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len([name for name in trained if "score" in name]) == 1
    assert all("lora_" in name or "score" in name for name in trained)

    ids = random_ids(2, 8)
    hidden = [m.base_model.model.model(ids).last_hidden_state for m in (sft, model.eval())]
    torch.testing.assert_close(hidden[1], hidden[0])

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.05)
    save_directory(model, tokenizer(), tmp_path / "reward")
    assert read_adapter_config(tmp_path / "reward")["task_type"] == "SEQ_CLS"
    again = load_model(ModelSource(str(base), read_adapter(tmp_path / "reward")), head="score")
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert logits_of(again, ids).shape == (2, 1)


def test_reward_model_on_a_bfloat16_base(base: Path, adapter: Path, tmp_path: Path):
    """Its head trains in float32 like the adapter."""
    source = ModelSource(str(base), read_adapter(adapter))
    model = prepare_trainable(source, lora=LORA, merge_dir=tmp_path / "m", head="score", dtype="bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_ids(2, 8), labels=torch.tensor([1.0, 0.0])).loss.backward()


def test_reward_model_without_its_head(base: Path, adapter: Path, tmp_path: Path):
    """Once it is a reward model, the head is a tensor like any other."""
    source = ModelSource(str(base), read_adapter(adapter))
    model = prepare_trainable(source, lora=LORA, merge_dir=tmp_path / "merged", head="score")
    save_directory(model, tokenizer(), tmp_path / "reward")
    name = next(key for key in load_file(tmp_path / "reward" / "adapter_model.safetensors") if "score" in key)
    edit(tmp_path / "reward", drop=name)
    with pytest.raises(ModelError, match=re.escape(name)):
        load_model(ModelSource(str(base), read_adapter(tmp_path / "reward")), head="score")
