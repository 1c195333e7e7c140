"""fp8 checkpoints with a scale for each block of 128 x 128, written here as DeepSeek-V3's are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek_v2_modeling import ModelError, lora_config, merge_lora
from deepseek_v2_modeling.checkpoints.lazy_tensors import BlockScaled
from deepseek_v2_modeling.loading import check_weights, load_base, read_settings

from ..helpers.family import member
from ..helpers.models import logits_of, random_adapter, random_ids, relative

WIDE: dict[str, Any] = {"hidden_size": 160, "moe_intermediate_size": 136, "num_hidden_layers": 2}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
KEPT = ("norm", "embed_tokens", "lm_head", "gate.weight", "bias")


def blocks(weight: torch.Tensor) -> Any:
    """(rows, columns) of each block."""
    for r in range(0, weight.shape[0], 128):
        for c in range(0, weight.shape[1], 128):
            yield slice(r, r + 128), slice(c, c + 128)


def quantise(directory: Path) -> dict[str, torch.Tensor]:
    """Write the weights as fp8 in place; returns what they stand for, in float32."""
    meant, stored = {}, {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        meant[name] = stored[name] = tensor
        if tensor.ndim != 2 or any(word in name for word in KEPT):
            continue
        small, value = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn), torch.empty(tensor.shape)
        scales = torch.empty(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128))
        for rows, columns in blocks(tensor):
            scale = tensor[rows, columns].abs().max() / 448
            small[rows, columns] = (tensor[rows, columns] / scale).to(torch.float8_e4m3fn)
            value[rows, columns] = small[rows, columns].float() * scale
            scales[rows.start // 128, columns.start // 128] = scale
        stored |= {name: small, f"{name}_scale_inv": scales}
        meant[name] = value
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    edit(directory, quantization_config=FP8)
    return meant


def edit(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    member("v3", **WIDE).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_loaded_as_what_they_stand_for(base: Path, tmp_path: Path):
    meant = quantise(base)
    settings = read_settings(str(base))
    check_weights(str(base), settings, "causal_lm")  # from the headers alone
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == meant.keys() and all(torch.equal(plain[name], meant[name]) for name in meant)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    narrow = load_base(str(base), dtype="bfloat16")
    assert torch.equal(narrow.state_dict()["lm_head.weight"], model.lm_head.weight.bfloat16())
    weights = narrow.model.layers[1].mlp.experts.down_proj, model.model.layers[1].mlp.experts.down_proj
    assert weights[0].dtype == torch.bfloat16 and torch.equal(weights[0], weights[1].bfloat16())
    ids = random_ids(1, 8)
    assert torch.equal(logits_of(load_base(str(tmp_path / "plain")).eval(), ids), logits_of(model, ids))


@pytest.mark.parametrize(("first", "last"), [(0, 300), (0, 128), (100, 200), (128, 256), (290, 400), (200, 200)])
def test_some_rows(first: int, last: int):
    """What a process reads of a shared weight."""
    weight = BlockScaled(torch.randn(300, 150).to(torch.float8_e4m3fn), torch.rand(3, 2))
    assert torch.equal(weight[first:last], weight[...][first:last])


@pytest.mark.parametrize(
    "other",
    [{"weight_block_size": [64, 64]}, {"weight_block_size": None}, {"fmt": "e5m2"}, {"quant_method": "gptq"}],
)
def test_other_kinds_are_refused(base: Path, other: dict[str, Any]):
    quantise(base)
    edit(base, quantization_config={**FP8, **other})
    with pytest.raises(ModelError, match="quantization_config"):
        AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ModelError, match="quantised"):
        read_settings(str(base))


def test_scales_that_do_not_fit(base: Path):
    quantise(base)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    for wrong, message in (
        (
            {f"{name}_scale_inv": torch.ones(1, 1)},
            r"experts\.3\.down_proj\.weight_scale_inv is F32 \[1, 1\], not F32 \[2, 2\]",
        ),
        ({f"{name}_scale_inv": None}, rf"{name} is stored as F8_E4M3 without its scales {name}_scale_inv"),
        ({"model.norm.weight_scale_inv": torch.ones(1)}, r"unexpected tensors: model\.norm\.weight_scale_inv"),
    ):
        kept = {key: value for key, value in (tensors | wrong).items() if value is not None}
        save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message):
            AutoModelForCausalLM.from_pretrained(base)


def test_not_where_transformers_reads_the_files(base: Path):
    quantise(base)
    with pytest.raises(ModelError, match="fp8 weights cannot be offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(base, disable_mmap=True)


def test_merged(base: Path, tmp_path: Path):
    """Also a full model: a way to write it in bf16. The scales may be in another shard than their weights."""
    meant = quantise(base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    index: dict[str, Any] = {"metadata": {}}
    index["weight_map"] = {name: f"model-{1 + name.endswith('inv')}.safetensors" for name in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in set(index["weight_map"].values()):
        part = {name: tensor for name, tensor in tensors.items() if index["weight_map"][name] == file}
        save_file(part, base / file, metadata={"format": "pt"})
    merge_lora(base, tmp_path / "copy", "float32")
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert copied.keys() == meant.keys() and all(torch.equal(copied[name], meant[name]) for name in meant)
    merge_lora(base, tmp_path / "narrow")
    narrow = load_file(tmp_path / "narrow" / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(narrow[name], meant[name].bfloat16()) and narrow["lm_head.weight"].dtype == torch.float32
    adapter = random_adapter(load_base(str(base)), lora_config(("attention", "experts"), r=2))
    adapter.save_pretrained(tmp_path / "adapter")
    merge_lora(tmp_path / "adapter", tmp_path / "merged", "float32")
    ids = random_ids(1, 8)
    assert relative(logits_of(load_base(str(tmp_path / "merged")).eval(), ids), logits_of(adapter, ids)) < 1e-5
