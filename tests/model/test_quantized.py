"""Frozen weights in 4 and 8 bits: a quantised model computes what one with its dequantised values does, and those exist
only while a product needs them."""

import copy
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deepseek_v2_modeling import (
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    ModelError,
    apply_lora,
    lora_config,
    merge_lora,
    preset_config,
)
from deepseek_v2_modeling.kernels.quantized_weights import Quantized, QuantizedLinear, Storage
from deepseek_v2_modeling.layers.quantization import check_quantization_library, quantization_of, storages

from ..helpers.live_memory import LiveMemory
from ..helpers.models import IN_BLOCKS, random_ids, small_config, small_model

bitsandbytes: Any = pytest.importorskip("bitsandbytes")
TARGETS = ("attention", "experts", "shared_experts", "dense", "router")
QUANTIZATIONS = ("nf4", "int8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "base"
    small_model(**IN_BLOCKS).save_pretrained(path)
    return path


def quantized(base: Path, quantization: str = "nf4", **keywords: Any) -> Any:
    return DeepseekV2ForCausalLM.from_pretrained(base, quantization=quantization, **keywords)


def values_of(model: Any, name: str, storage: Storage) -> torch.Tensor:
    return Quantized(model.get_parameter(name), storage).to(torch.float32)


def twin_of(model: Any, base: Path) -> Any:
    """The plain model with the values that products of a quantised one use."""
    twin = DeepseekV2ForCausalLM.from_pretrained(base)
    for name, storage in storages(model).items():
        twin.get_parameter(name).data = values_of(model, name, storage)
    return twin


def adapted(model: Any, dropout: float = 0.0) -> Any:
    """With adapters that do something, the same for every model."""
    model = apply_lora(model, lora_config(TARGETS, r=4, dropout=dropout))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model.train()


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # dropout
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# What is stored


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_which_weights_and_in_how_many_bits(base: Path, quantization: str):
    model, plain = quantized(base, quantization), DeepseekV2ForCausalLM.from_pretrained(base)
    found, left = storages(model), []
    for name, parameter in plain.named_parameters():
        mine = model.get_parameter(name)
        if name not in found:
            left.append(name)
            assert torch.equal(mine, parameter)
            continue
        share = mine.nbytes / (2 * parameter.numel())
        in_8_bits = quantization == "int8" or "self_attn" in name
        assert found[name].scheme == ("int8" if in_8_bits else "nf4")
        assert share < (0.54 if in_8_bits else 0.3) and not mine.requires_grad
        error = (values_of(model, name, found[name]) - parameter).norm() / parameter.norm()
        assert error < (0.01 if in_8_bits else 0.1)
    assert all(part in name for name in left for part in ("weight",))
    kinds = {name.split(".")[-2] for name in left}
    assert kinds == {"embed_tokens", "lm_head", "norm", "gate"} | {k for k in kinds if k.endswith("layernorm")}
    assert quantization_of(model) == quantization and quantization_of(plain) is None


def test_codes_are_those_of_bitsandbytes(base: Path):
    """Of Linear4bit, and of Linear8bitLt's weights."""
    plain, four, eight = DeepseekV2ForCausalLM.from_pretrained(base), quantized(base), quantized(base, "int8")
    name = "model.layers.1.mlp.experts.down_proj"
    weight = plain.get_parameter(name).detach()
    codes, state = bitsandbytes.functional.quantize_4bit(weight[3], blocksize=64, quant_type="nf4")
    stored, storage = four.get_parameter(name)[3], storages(four)[name]
    one = Storage("nf4", storage.shape[1:])
    assert torch.equal(one.parts(stored)[0], codes.flatten()) and torch.equal(one.parts(stored)[1], state.absmax)
    torch.testing.assert_close(
        values_of(four, name, storage)[3], bitsandbytes.functional.dequantize_4bit(codes, state), rtol=0, atol=0
    )
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight[3])
    found = values_of(eight, name, storages(eight)[name])[3]
    wanted = bitsandbytes.functional.int8_vectorwise_dequant(codes, scales)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_experts_that_are_fused_on_disk(base: Path, tmp_path: Path):
    model = quantized(base)
    tensors = dict(DeepseekV2ForCausalLM.from_pretrained(base).state_dict())
    again = DeepseekV2ForCausalLM.from_pretrained(
        None, config=small_config(**IN_BLOCKS), state_dict=tensors, quantization="nf4"
    )
    for name in storages(model):
        assert torch.equal(model.get_parameter(name), again.get_parameter(name))


# What is computed


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_model_is_that_of_the_dequantised_values(base: Path, quantization: str, dropout: float):
    """Logits, decoding on a cache and the gradients of all adapters; dropout takes another way through the experts."""
    model, ids = quantized(base, quantization), random_ids(2, 40)
    twin = twin_of(model, base)
    for each in (model, twin):
        each.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, atol=1e-5, rtol=1e-5)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(ids, **settings), twin.generate(ids, **settings))
    found, wanted = gradients(adapted(model, dropout), ids), gradients(adapted(twin, dropout), ids)
    assert found.keys() == wanted.keys() and any("experts" in name for name in found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_same_values_on_a_gpus_path(base: Path, quantization: str, monkeypatch: pytest.MonkeyPatch):
    """Ragged products, which read all experts at once."""
    model, ids = quantized(base, quantization), random_ids(1, 24)
    wanted = gradients(adapted(copy.deepcopy(model)), ids)

    def ragged(self: Any, sizes_E: torch.Tensor, block: int = 0, rows: int | None = None) -> None:
        self.looped, self.ends = False, sizes_E.cumsum(0).to(torch.int32)

    monkeypatch.setattr("deepseek_v2_modeling.kernels.grouped_products.Groups.__init__", ragged)
    for name, gradient in gradients(adapted(model), ids).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_mini_in_4_bits(tmp_path: Path):
    """Experts in at most 0.3 of bf16's memory, and gradients of adapters that point where bf16's do."""
    config = preset_config("v2-lite-mini")
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    plain: Any = DeepseekV2ForCausalLM(config)
    plain.to(torch.bfloat16).save_pretrained(tmp_path)
    ids, flat, sizes = random_ids(1, 64, vocab=config.vocab_size), [], []
    for quantization in (None, "nf4"):
        model: Any = DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization=quantization)
        sizes.append(sum(p.nbytes for name, p in model.named_parameters() if ".mlp.experts." in name))
        torch.manual_seed(1)
        model = apply_lora(model, lora_config(("attention", "experts", "shared_experts"), r=8)).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            flat.append(torch.cat([gradient.flatten() for gradient in gradients(model, ids).values()]))
    assert sizes[1] <= 0.3 * sizes[0]
    assert torch.cosine_similarity(*flat, dim=0) >= 0.98


# Memory


def test_no_values_stay_between_forward_and_backward(base: Path):
    """A forward pass of a quantised model keeps what one of a plain model does, and its backward pass adds the values
    of one weight at most: those of one expert, or of a linear layer."""
    ids = random_ids(1, 8)
    kept, peaks = [], []
    for model in (DeepseekV2ForCausalLM.from_pretrained(base), quantized(base)):
        model = adapted(model)
        with LiveMemory(list(model.parameters())) as meter:
            loss = model(input_ids=ids, labels=ids).loss
            kept.append(meter.live)
            meter.restart()
            loss.backward()
            peaks.append(meter.peak)
    largest = 4 * max(64 * 2 * 64, 64 * 128, 256 * 64)  # an expert, a dense layer, kv_b_proj
    assert kept[1] <= kept[0]
    assert peaks[1] <= peaks[0] + 2 * largest


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_a_plain_copy_never_exists(tmp_path: Path):
    """While a model is loaded, memory stays below half of its bf16 weights."""
    with torch.device("meta"):
        wide = {**IN_BLOCKS, "hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 32}
        model: Any = DeepseekV2ForCausalLM(small_config(**wide, num_hidden_layers=5))
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    model.save_pretrained(tmp_path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model, parameter
    before, peaks, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peaks.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        loaded = quantized(tmp_path, dtype=torch.bfloat16)
    finally:
        done.set()
        watcher.join()
    assert size > 1e8 and quantization_of(loaded) == "nf4"
    assert max(peaks) - before < 0.5 * size


# What belongs to it


def test_an_adapter_is_merged_into_the_original(base: Path, tmp_path: Path):
    """The merge reads the base's own files: it is the same whatever the adapter was trained on."""
    for name, model in (("plain", DeepseekV2ForCausalLM.from_pretrained(base)), ("quantized", quantized(base))):
        adapted(model).save_pretrained(str(tmp_path / name))
        merge_lora(tmp_path / name, tmp_path / f"{name}_merged")
    found, wanted = (load_file(tmp_path / f"{name}_merged/model.safetensors") for name in ("quantized", "plain"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())


def test_bitsandbytes_config(base: Path):
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=four, dtype=torch.bfloat16)
    assert quantization_of(model) == "nf4" and isinstance(model.model.layers[0].self_attn.o_proj, QuantizedLinear)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    for cls in (DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification):
        assert quantization_of(cls.from_pretrained(base, quantization_config=eight)) == "int8"
    for key, value in (
        ("bnb_4bit_quant_type", "fp4"),
        ("bnb_4bit_use_double_quant", True),
        ("bnb_4bit_compute_dtype", torch.float16),
        ("llm_int8_skip_modules", ["o_proj"]),
    ):
        settings = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", key: value})
        with pytest.raises(ModelError, match=f"quantization_config: {key} is .*: with nf4 only"):
            DeepseekV2ForCausalLM.from_pretrained(base, quantization_config=settings)
    with pytest.raises(ModelError, match='quantization is "int8", and quantization_config says nf4'):
        quantized(base, "int8", quantization_config=four)


def test_what_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ModelError, match='quantization is "fp4": use one of nf4, int8'):
        quantized(base, "fp4")
    with pytest.raises(ModelError, match="done while a checkpoint is read"):
        DeepseekV2ForCausalLM(small_config(**IN_BLOCKS), quantization="int8")
    with pytest.raises(ModelError, match=r"quantised to nf4, which is not saved: .* merge that into the original"):
        quantized(base).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ModelError, match="cannot be offloaded to disk, or read with disable_mmap"):
        quantized(base, disable_mmap=True)
    small_model().save_pretrained(tmp_path / "narrow")
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.q_proj.weight has rows of 32 values, .* of 64"):
        quantized(tmp_path / "narrow")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"quantization nf4 needs bitsandbytes, .*: pip install bitsandbytes"):
        check_quantization_library("nf4")
    check_quantization_library("int8")


def test_broken_numbers_are_named(base: Path, tmp_path: Path):
    small_model(**IN_BLOCKS).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.mlp.experts.5.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model.layers.2.mlp.experts.5.up_proj.weight contains NaN"):
        quantized(tmp_path)
