"""From a path to a model for a trainer, and back to a directory."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import deepseek_v2_modeling.loading
from deepseek_v2_modeling import DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification, ModelError
from deepseek_v2_modeling.checkpoints.tensor_files import whole_directory
from deepseek_v2_modeling.loading import (
    LoraSettings,
    ModelSource,
    load_base,
    load_lm_head,
    load_model,
    load_tokenizer,
    prepare_trainable,
    read_adapter,
    resolve_source,
    save_directory,
    write_model,
)

from ..helpers.models import logits_of, random_adapter, random_ids, shake, small_model, stock_twin, tokenizer

LORA = LoraSettings(targets=("attention", "experts"), r=2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_directory(small_model(), tokenizer(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A finished run of SFT with LoRA, with a checkpoint."""
    model = random_adapter(load_base(str(base)), LORA.config("CAUSAL_LM"))
    for name in ("final", "checkpoint-2"):
        save_directory(model, tokenizer(), tmp_path / "run" / name)
    (tmp_path / "run" / "manifest.json").write_text("{}")
    return tmp_path / "run"


# What a path stands for


def test_model_directory(base: Path):
    assert resolve_source(base) == resolve_source(str(base)) == ModelSource(str(base))


def test_run_final_and_adapter(base: Path, run: Path):
    final = ModelSource(str(base), read_adapter(run / "final"))
    assert resolve_source(run) == resolve_source(run / "final") == final
    assert resolve_source(run / "checkpoint-2") == ModelSource(str(base), read_adapter(run / "checkpoint-2"))


def test_run_of_full_fine_tuning(tmp_path: Path):
    save_directory(small_model(), tokenizer(), tmp_path / "run" / "final")
    assert resolve_source(tmp_path / "run") == ModelSource(str(tmp_path / "run" / "final"))


def test_sharded_model(tmp_path: Path):
    small_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert resolve_source(tmp_path) == ModelSource(str(tmp_path))


def test_hub_name():
    assert resolve_source("deepseek-ai/DeepSeek-V2-Lite") == ModelSource("deepseek-ai/DeepSeek-V2-Lite")


@pytest.mark.parametrize("path", ["nowhere", "./nowhere/there", "/nowhere/there", "a/b/c"])
def test_no_such_directory(path: str):
    with pytest.raises(ModelError, match=f"{re.escape(path)}.*dsv2 init"):
        resolve_source(path)


def test_unusable_directories(tmp_path: Path, base: Path, run: Path):
    def refused(directory: Path, *named: str) -> None:
        with pytest.raises(ModelError) as caught:
            resolve_source(directory)
        assert all(word in str(caught.value) for word in (str(directory), *named))

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "manifest.json").write_text("{}")
    refused(tmp_path / "unfinished", "final/", "finish")
    (base / "model.safetensors").unlink()
    refused(base, "weights", "model.safetensors")
    config = json.loads((run / "final" / "adapter_config.json").read_text())
    for wrong, named in (("", "base_model_name_or_path"), (str(run / "checkpoint-2"), "adapter itself")):
        config["base_model_name_or_path"] = wrong
        (run / "final" / "adapter_config.json").write_text(json.dumps(config))
        refused(run / "final", named)


def test_a_hub_name_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="someone/something"):
        load_base("someone/something")


def test_tokenizer(base: Path, run: Path, tmp_path: Path):
    assert resolve_source(run).tokenizer_dir == str(run / "final")
    (run / "final" / "tokenizer_config.json").unlink()
    assert resolve_source(run).tokenizer_dir == str(base)
    found = load_tokenizer(resolve_source(run))
    assert found.padding_side == "left" and found("w3 w4")["input_ids"] == [3, 4]
    small_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(ModelSource(str(tmp_path / "bare")))


# For inference


def test_load_model(base: Path, run: Path):
    ids = random_ids(2, 6)
    plain, adapted = load_model(resolve_source(base)), load_model(resolve_source(run), config={"aux_loss_alpha": 0.7})
    for model in (plain, adapted):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert isinstance(plain, DeepseekV2ForCausalLM) and isinstance(adapted, PeftModel)
    assert adapted.config.aux_loss_alpha == 0.7
    wanted = random_adapter(small_model(), LORA.config("CAUSAL_LM"))
    torch.testing.assert_close(logits_of(adapted, ids), logits_of(wanted, ids))
    assert load_model(resolve_source(base), dtype="bfloat16").dtype == torch.bfloat16


# For a trainer


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("head", ["causal_lm", "score"])
def test_full_fine_tuning_is_in_float32(base: Path, tmp_path: Path, head: Any):
    model = prepare_trainable(resolve_source(base), lora=None, merge_dir=tmp_path / "m", dtype="bfloat16", head=head)
    assert model.training and {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert len(trainable(model)) == len(list(model.parameters()))
    wanted = DeepseekV2ForCausalLM if head == "causal_lm" else DeepseekV2ForSequenceClassification
    assert type(model) is wanted


@pytest.mark.parametrize("head", ["causal_lm", "score"])
def test_fresh_adapter_on_a_bfloat16_base(base: Path, tmp_path: Path, head: Any):
    model = prepare_trainable(resolve_source(base), lora=LORA, merge_dir=tmp_path / "m", dtype="bfloat16", head=head)
    assert model.training and isinstance(model, PeftModel)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert any("score" in name for name in trainable(model)) == (head == "score")
    assert not (tmp_path / "m").exists()


def test_adapter_goes_on(run: Path, tmp_path: Path):
    model = prepare_trainable(resolve_source(run), lora=LORA, merge_dir=tmp_path / "m")
    ids = random_ids(2, 6)
    assert torch.equal(logits_of(model.eval(), ids), logits_of(load_model(resolve_source(run)), ids))
    assert trainable(model) and all("lora_" in name for name in trainable(model))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "lora",
    [
        None,
        LoraSettings(targets=("attention", "experts"), r=4),
        LoraSettings(targets=("attention", "experts"), r=2, alpha=1),
        LoraSettings(targets=("attention",), r=2),
        LoraSettings(targets=("attention", "experts"), r=2, rslora=True),
        LoraSettings(targets=("attention", "experts"), r={"attention": 2, "experts": 3}),
    ],
)
def test_other_settings_merge_first(run: Path, tmp_path: Path, lora: LoraSettings | None):
    model = prepare_trainable(resolve_source(run), lora=lora, merge_dir=tmp_path / "m")
    ids, wanted = random_ids(2, 6), logits_of(load_model(resolve_source(run)), random_ids(2, 6))
    torch.testing.assert_close(logits_of(model.eval(), ids), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of(stock_twin(tmp_path / "m"), ids), wanted, rtol=0, atol=1e-5)
    assert isinstance(model, PeftModel) == (lora is not None)
    assert load_tokenizer(resolve_source(tmp_path / "m"))
    assert all("lora_" in name for name in trainable(model)) or lora is None


# To a directory


def test_an_adapter_replaces_an_older_final(run: Path, base: Path, tmp_path: Path):
    """The frozen reference of RL is not saved, and an older final/ is replaced whole."""
    model = prepare_trainable(resolve_source(run), lora=LORA, merge_dir=tmp_path / "m")
    assert isinstance(model, PeftModel)
    model.add_adapter("ref", LORA.config("CAUSAL_LM"))
    shake(model, seed=9, adapter="ref")
    shake(model, seed=10)
    (run / "final" / "left over").write_text("")
    with whole_directory(run / "final", replace=True) as folder:
        write_model(model, tokenizer(), folder)
    assert not (run / "final" / "left over").exists() and not (run / "final" / "ref").exists()
    assert not any("ref" in name for name in load_file(run / "final" / "adapter_model.safetensors"))
    ids = random_ids(2, 6)
    assert torch.equal(logits_of(load_model(resolve_source(run)), ids), logits_of(model.eval(), ids))
    assert not list(run.glob(".*"))


def test_save_directory_in_another_dtype(tmp_path: Path):
    """Full fine-tuning trains in float32 and writes what the recipe says."""
    model, ids = small_model(), random_ids(1, 6)
    save_directory(model, tokenizer(), tmp_path / "final", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "final" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32
    rounded = logits_of(small_model().to(torch.bfloat16).float(), ids)
    torch.testing.assert_close(logits_of(load_base(str(tmp_path / "final")).eval(), ids), rounded)
    assert stock_twin(tmp_path / "final").dtype == torch.bfloat16


def test_a_chains_directory_names_its_stages(tmp_path: Path):
    for stage in ("sft", "rl"):
        (tmp_path / stage / "final").mkdir(parents=True)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ModelError, match=r"a chain's directory: name one of its stages, such as .*rl$"):
        resolve_source(tmp_path)


def test_an_unfinished_run_says_so(tmp_path: Path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ModelError, match="no final/ yet"):
        resolve_source(tmp_path)


# The LM head alone


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lm_head_is_read_without_the_model(tied: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_directory(small_model(tie_word_embeddings=tied), tokenizer(), tmp_path / "base")
    base = tmp_path / "base"
    whole: Any = load_model(ModelSource(str(base)), dtype=dtype)
    monkeypatch.setattr(deepseek_v2_modeling.loading, "load_base", None)
    head: Any = load_lm_head(ModelSource(str(base)), dtype)
    assert torch.equal(head.weight, whole.lm_head.weight) and head.weight.dtype == whole.lm_head.weight.dtype
    assert not head.weight.requires_grad and head.bias is None
    hidden = torch.randn(3, whole.config.hidden_size, dtype=head.weight.dtype)
    assert torch.equal(head(hidden), whole.lm_head(hidden))


def test_an_adapter_on_the_lm_head_is_part_of_it(base: Path, run: Path, tmp_path: Path):
    assert torch.equal(load_lm_head(resolve_source(run)).weight, load_base(str(base)).lm_head.weight)
    model = random_adapter(load_base(str(base)), LoraSettings(targets=("lm_head",), r=2).config("CAUSAL_LM"))
    save_directory(model, tokenizer(), tmp_path / "adapter")
    hidden = torch.randn(3, model.config.hidden_size)
    expected = model.get_output_embeddings()(hidden)
    assert torch.equal(load_lm_head(resolve_source(tmp_path / "adapter"))(hidden), expected)


def test_a_lm_head_that_is_damaged_is_named(base: Path):
    weights = load_file(base / "model.safetensors")
    for damaged, said in (
        ({**weights, "lm_head.weight": weights["lm_head.weight"][1:]}, r"lm_head.weight is \("),
        ({**weights, "lm_head.weight": weights["lm_head.weight"] * torch.nan}, "lm_head.weight"),
        ({k: v for k, v in weights.items() if k != "lm_head.weight"}, "lm_head.weight is missing"),
    ):
        save_file({k: v.contiguous() for k, v in damaged.items()}, base / "model.safetensors")
        with pytest.raises(ModelError, match=said):
            load_lm_head(ModelSource(str(base)))
