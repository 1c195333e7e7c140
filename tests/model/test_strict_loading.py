"""`from_pretrained` of the classes themselves: what must fit, what need not, and what is said about it."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from deepseek_v2_modeling import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2Model,
    ModelError,
)
from deepseek_v2_modeling.checkpoints.hub_layout import hub_layout
from deepseek_v2_modeling.modeling import DeepseekV2PreTrainedModel

from ..helpers.models import SMALL, logits_of, random_ids, small_config, small_model

CLASSES: dict[str, Any] = {
    "backbone": DeepseekV2Model,
    "causal": DeepseekV2ForCausalLM,
    "score": DeepseekV2ForSequenceClassification,
    "auto backbone": AutoModel,
    "auto causal": AutoModelForCausalLM,
    "auto score": AutoModelForSequenceClassification,
}
PLACES = [
    "model.norm.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.shared_experts.down_proj.weight",
    "model.layers.1.mlp.experts.3.up_proj.weight",
]
EXPERTS = 2 * SMALL["n_routed_experts"] * 3


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_model().save_pretrained(tmp_path)
    return tmp_path


def edit(directory: Path, drop: str | None = None, put: dict[str, torch.Tensor] | None = None) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(tensors | (put or {}), path, metadata={"format": "pt"})


def refusal(cls: Any, directory: Any, **kwargs: Any) -> str:
    with pytest.raises(ModelError) as caught:
        cls.from_pretrained(directory, **kwargs)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def equal(found: PreTrainedModel, wanted: PreTrainedModel) -> bool:
    ours, theirs = found.state_dict(), wanted.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# What must fit


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("place", PLACES)
def test_missing_and_misshapen(saved: Path, name: str, place: str):
    """In the names of the class: the backbone has no `model.` before them."""
    edit(saved, put={place: torch.zeros(3, 5)})
    message = refusal(CLASSES[name], saved)
    assert "misshapen" in message and place.removeprefix("model.") in message and "[3, 5], not [" in message
    edit(saved, drop=place)
    message = refusal(CLASSES[name], saved)
    assert "missing" in message and place.removeprefix("model.") in message


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "extra", ["model.layers.9.mlp.up_proj.weight", "model.layers.1.mlp.experts.8.up_proj.weight", "other.weight"]
)
def test_unexpected(saved: Path, name: str, extra: str):
    edit(saved, put={extra: torch.zeros(2, 2)})
    message = refusal(CLASSES[name], saved)
    assert "unexpected" in message and extra in message


def test_every_kind_is_named_and_many_are_counted(saved: Path):
    edit(saved, drop="model.norm.weight", put={"model.nrm.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)})
    message = refusal(DeepseekV2ForCausalLM, saved)
    assert all(
        word in message for word in ("model.norm.weight", "model.nrm.weight", "lm_head.weight [2], not [61, 32]")
    )
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "n_routed_experts": 12}))
    assert "and 20 more" in refusal(DeepseekV2ForCausalLM, saved)  # 4 experts in 2 layers, 3 each, and the norm


def test_nothing_is_read_before_the_check(saved: Path, monkeypatch: pytest.MonkeyPatch):
    from deepseek_v2_modeling.checkpoints import strict as checkpoints

    monkeypatch.setattr(checkpoints.FusedExperts, "to", lambda *args, **kwargs: pytest.fail("read"))
    edit(saved, drop="lm_head.weight")
    assert "lm_head.weight" in refusal(DeepseekV2ForCausalLM, saved)


def test_one_tensor_under_two_names(saved: Path):
    edit(saved, put={"norm.weight": torch.zeros(32)})
    assert "norm.weight" in refusal(DeepseekV2ForCausalLM, saved)


# Heads


def test_score_head_is_new_and_lm_head_left(saved: Path, capsys: Any, caplog: Any, monkeypatch: Any):
    """One line says so, and there is no table in the log."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, info = DeepseekV2ForSequenceClassification.from_pretrained(saved, num_labels=3, output_loading_info=True)
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert "score.weight" in line and "lm_head.weight" in line and str(saved) in line
    assert info["missing_keys"] == {"score.weight"} and info["unexpected_keys"] == {"lm_head.weight"}
    assert model.score.weight.shape == (3, 32) and model.score.weight.std() > 0.01
    assert "REPORT" not in caplog.text
    edit(saved, put={"score.weight": torch.ones(3, 32)})
    model = DeepseekV2ForSequenceClassification.from_pretrained(saved, num_labels=3)
    assert "score.weight" not in capsys.readouterr().out and torch.equal(model.score.weight, torch.ones(3, 32))


@pytest.mark.parametrize("head", ["lm_head.weight", "score.weight"])
def test_backbone_leaves_a_head(tmp_path: Path, capsys: Any, head: str):
    whole = small_model(DeepseekV2ForCausalLM if head.startswith("lm") else DeepseekV2ForSequenceClassification)
    whole.save_pretrained(tmp_path)
    assert equal(DeepseekV2Model.from_pretrained(tmp_path), whole.model)
    assert capsys.readouterr().out.strip() == f"{tmp_path}: left out: {head}"


def test_backbone_alone(tmp_path: Path, capsys: Any):
    """Saved by itself its names have no prefix. It makes a backbone and a reward model, but no language model."""
    backbone = small_model(DeepseekV2Model)
    backbone.save_pretrained(tmp_path)
    assert equal(DeepseekV2Model.from_pretrained(tmp_path), backbone)
    assert not capsys.readouterr().out
    assert equal(DeepseekV2ForSequenceClassification.from_pretrained(tmp_path, num_labels=1).model, backbone)
    assert "score.weight" in capsys.readouterr().out
    assert "lm_head.weight" in refusal(DeepseekV2ForCausalLM, tmp_path)
    tied = DeepseekV2ForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)
    assert equal(tied.model, backbone) and tied.lm_head.weight is tied.model.embed_tokens.weight


def test_language_model_from_a_reward_model(tmp_path: Path):
    for tied in (False, True):
        small_model(DeepseekV2ForSequenceClassification, tie_word_embeddings=tied).save_pretrained(tmp_path)
        message = refusal(DeepseekV2ForCausalLM, tmp_path)
        assert "score.weight" in message and ("lm_head.weight" in message) == (not tied)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_tied_embeddings(tmp_path: Path, kept: str):
    """Old files hold both names, or the other one."""
    model = small_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    embeddings = model.lm_head.weight.detach().clone()
    edit(tmp_path, drop="model.embed_tokens.weight")
    assert "embed_tokens" in refusal(DeepseekV2ForCausalLM, tmp_path)
    names = ["lm_head.weight", "model.embed_tokens.weight"] if kept == "both" else [kept]
    edit(tmp_path, put={name: embeddings.clone() for name in names})
    again = DeepseekV2ForCausalLM.from_pretrained(tmp_path)
    assert equal(again, model) and again.lm_head.weight is again.model.embed_tokens.weight


def test_buffers_of_old_checkpoints(saved: Path, capsys: Any):
    edit(saved, put={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)})
    model, info = DeepseekV2ForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert equal(model, small_model()) and not info["unexpected_keys"] and not capsys.readouterr().out


# A class of the user's own


class Valued(DeepseekV2PreTrainedModel):
    """Inherits nothing of stock's DeepSeek-V2."""

    new_heads = ("value.",)
    other_heads = ("lm_head.",)

    def __init__(self, config: DeepseekV2Config):
        super().__init__(config)
        self.model = DeepseekV2Model(config)
        self.value = nn.Linear(config.hidden_size, 1)
        self.post_init()


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_own_class(saved: Path, tmp_path: Path, capsys: Any, shard_size: str):
    assert not any("models.deepseek_v2" in base.__module__ for base in Valued.__mro__)
    model = Valued.from_pretrained(saved)
    assert "value.bias, value.weight" in capsys.readouterr().out
    assert equal(model.model, small_model().model)
    model.save_pretrained(tmp_path / "own", max_shard_size=shard_size)
    files = list((tmp_path / "own").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size == "20KB")
    names = [name for path in files for name in load_file(path)]
    assert len(names) == len(set(names)) and sum(".mlp.experts." in name for name in names) == EXPERTS
    assert not any("gate_up_proj" in name for name in names)
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["rope_scaling"]["type"] == config["rope_parameters"]["rope_type"] == "yarn"
    assert equal(Valued.from_pretrained(tmp_path / "own"), model)


# Files


def test_only_safetensors(saved: Path):
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    for name in CLASSES:
        assert "safetensors" in refusal(CLASSES[name], saved)
    assert "safetensors" in refusal(DeepseekV2ForCausalLM, saved, use_safetensors=False)


def test_explicit_safetensors(saved: Path):
    assert equal(DeepseekV2ForCausalLM.from_pretrained(saved, use_safetensors=True), small_model())
    assert "only safetensors" in refusal(DeepseekV2ForCausalLM, saved, use_safetensors=False)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_a_file_cut_off(saved: Path, dtype: Any):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refusal(DeepseekV2ForCausalLM, saved, dtype=dtype)


def test_a_shard_that_is_not_there(tmp_path: Path):
    small_model().save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    assert "model-00002-of" in refusal(DeepseekV2ForCausalLM, tmp_path)


def test_fused_files_and_state_dicts(tmp_path: Path):
    """Files that hold the fused experts load too, and are written one by one again."""
    model = small_model()
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    again = DeepseekV2ForCausalLM.from_pretrained(tmp_path / "fused")
    assert equal(again, model)
    again.save_pretrained(tmp_path / "hub")
    hub = load_file(tmp_path / "hub" / "model.safetensors")
    assert sum(".mlp.experts." in name for name in hub) == EXPERTS
    for state in (model.state_dict(), hub):
        assert equal(DeepseekV2ForCausalLM.from_pretrained(None, config=model.config, state_dict=state), model)
    del hub["model.norm.weight"]
    with pytest.raises(ModelError, match=r"state_dict: missing tensors: model\.norm\.weight"):
        DeepseekV2ForCausalLM.from_pretrained(None, config=model.config, state_dict=hub)


def test_layout_covers_every_parameter_once():
    shapes = {name: tuple(tensor.shape) for name, tensor in small_model().state_dict().items()}
    layout = hub_layout(shapes)
    filled = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for piece in layout.values():
        filled[piece.parameter][... if piece.place is None else piece.place] += torch.ones(piece.shape)
    assert all((tensor == 1).all() for tensor in filled.values())


# Keywords of transformers


def test_keywords(saved: Path):
    load, wanted = DeepseekV2ForCausalLM.from_pretrained, small_model()
    assert load(saved, dtype="bfloat16").dtype == load(saved, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert equal(load(saved, device_map="cpu"), wanted) and equal(load(saved, device_map={"": "cpu"}), wanted)
    assert equal(load(saved, disable_mmap=True), wanted)
    config = small_config(aux_loss_alpha=0.5)
    model = load(saved, config=config)
    assert model.config.aux_loss_alpha == 0.5 and model.config is not config and equal(model, wanted)
    assert load(saved, config=str(saved), routed_scaling_factor=3).config.routed_scaling_factor == 3
    model, info = load(saved, output_loading_info=True)
    assert equal(model, wanted) and not any(info.values())
    assert not model.training


def test_ignore_mismatched_sizes(saved: Path, capsys: Any):
    """A new vocabulary, say. An expert of another shape stays an error."""
    edit(saved, put={name: torch.zeros(9, 32) for name in ("lm_head.weight", "model.embed_tokens.weight")})
    model = DeepseekV2ForCausalLM.from_pretrained(saved, ignore_mismatched_sizes=True)
    assert "newly initialised: lm_head.weight, model.embed_tokens.weight" in capsys.readouterr().out
    assert model.lm_head.weight.shape == (61, 32) and model.lm_head.weight.std() > 0.01
    assert torch.equal(model.model.norm.weight, small_model().model.norm.weight)
    edit(saved, put={PLACES[-1]: torch.zeros(9, 32)})
    assert PLACES[-1] in refusal(DeepseekV2ForCausalLM, saved, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("where", ["model.layers.1", "model.layers.1.mlp.experts", "model.layers.2.self_attn"])
def test_offloaded_to_disk(saved: Path, tmp_path: Path, where: str):
    """Weights that the model reads without calling the module that owns them: experts, and kv_b_proj in decoding."""
    places = {name: "cpu" for name, child in small_model().named_modules() if not any(child.children())}
    places |= {"model.layers.1.mlp.experts": "cpu", "model.layers.2.mlp.experts": "cpu"}
    places |= {"model.layers.1.mlp.gate": "cpu", "model.layers.2.mlp.gate": "cpu"}
    places = {name: "disk" if f"{name}.".startswith(f"{where}.") else device for name, device in places.items()}
    model = DeepseekV2ForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path / "offload")
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
    ids = random_ids(2, 6)
    torch.testing.assert_close(logits_of(model, ids), logits_of(small_model(), ids))
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 1}
    assert torch.equal(model.generate(ids, **settings), small_model().generate(ids, **settings))


# Memory


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peak_memory(tmp_path: Path, dtype: torch.dtype):
    """bf16 files, as released: at most 1.3 times the weights, also when they are loaded in float32 (stock: 1.7)."""
    wide = {"hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 32, "num_hidden_layers": 5}
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(small_config(**wide))
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    model.save_pretrained(tmp_path)
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    del model
    before, peaks, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peaks.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        loaded = DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    finally:
        done.set()
        watcher.join()
    assert size > 1e8 and loaded.dtype == dtype
    assert max(peaks) - before < 1.3 * size
