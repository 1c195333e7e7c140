"""DeepSeek-V2's family: the same logits and gradients as stock's classes, and what stock does otherwise."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteForCausalLM
from transformers.models.youtu.modeling_youtu import YoutuForCausalLM

from deepseek_v2_modeling import (
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    LatentCache,
    ModelError,
    export_adapter,
    load_adapter,
    lora_config,
    merge_lora,
    record_routing,
    replay_routing,
)
from deepseek_v2_modeling.adapters.copies import merged_copy
from deepseek_v2_modeling.checkpoints.stock_classes import stock_differences
from deepseek_v2_modeling.configuration import CORRECTION_BIAS
from deepseek_v2_modeling.esft.scores import score_experts
from deepseek_v2_modeling.generation import generate_answers
from deepseek_v2_modeling.layers.balance_losses import RouterOutput, layer_losses, sequence_ids
from deepseek_v2_modeling.layers.routing import choose_experts
from deepseek_v2_modeling.loading import load_base, read_settings, save_directory
from deepseek_v2_modeling.model_classes import model_class
from deepseek_v2_modeling.outline import apply_settings

from ..helpers import official
from ..helpers.adapters import EVERYWHERE
from ..helpers.family import MEMBERS, V3, StockPlain, member, member_config
from ..helpers.models import logits_of, random_adapter, random_ids, relative, stock_twin, tokenizer

STOCK: dict[str, Any] = {
    "v3": stock.DeepseekV3ForCausalLM,
    "moonlight": stock.DeepseekV3ForCausalLM,
    "glm": Glm4MoeLiteForCausalLM,
    "youtu": YoutuForCausalLM,
    "plain": StockPlain,
    "moe": StockPlain,
}
ARCHITECTURES = {name: cls.__name__ for name, cls in STOCK.items()} | {
    "plain": "DeepseekV2ForCausalLM",
    "moe": "DeepseekForCausalLM",
}
MIXTURES = [name for name in MEMBERS if name != "youtu"]
IDS = random_ids(2, 24)
ROUNDING = 3e-6


@pytest.fixture(params=MEMBERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def saved(model: Any, directory: Path) -> Path:
    save_directory(model, tokenizer(), directory)
    return directory


def gradients(model: Any, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    """Of the task's loss alone, which is all that stock's has."""
    model.train()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids)
    balance = getattr(loss, "aux_loss", None)
    (loss.loss - (0 if balance is None else balance)).backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and found
    assert max(relative(found[name], wanted[name]) for name in wanted if wanted[name].norm() > 0) < 1e-4


def test_logits_gradients_and_decoding_are_stocks(name: str, tmp_path: Path):
    model = member(name)
    twin = stock_twin(saved(model, tmp_path / "base"), STOCK[name])
    assert relative(logits_of(model, IDS), logits_of(twin, IDS)) < ROUNDING
    check_gradients(gradients(model), gradients(twin))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(again) is model_class(model.config, "causal_lm")
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
    # the latent cache, absorbed and quantised by nobody: the same tokens
    greedy: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(IDS, **greedy), twin.generate(IDS, **greedy))


def test_sampled_answers_are_those_of_plain_forwards(name: str):
    """From slots, with the adapters merged into a copy, which holds the routers' biases too; and a quantised cache."""
    targets = EVERYWHERE if name in MIXTURES else ("attention", "dense")
    adapted = random_adapter(member(name), lora_config(targets, r=2, alpha=3))
    prompts, wanted = [[5, 6, 7], [8, 9], [5, 6, 7]], []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(logits_of(adapted, torch.tensor([tokens]), use_cache=False)[0, -1].argmax()))
        wanted.append(tokens[len(prompt) :])
    asked: dict[str, Any] = {"pad_token_id": 1, "eos_token_id": 60, "max_new_tokens": 6, "batch_size": 2}
    assert generate_answers(merged_copy(adapted), prompts, **asked) == wanted
    cache = LatentCache(adapted.config, quantization="int8")
    with torch.no_grad():
        adapted(torch.tensor([wanted[0]]), past_key_values=cache)
        near = adapted(torch.tensor([[7]]), past_key_values=cache).logits[0, -1]
    exact = logits_of(adapted, torch.tensor([[*wanted[0], 7]]), use_cache=False)[0, -1]
    assert relative(near, exact) < 0.05


def test_lora_is_stock_pefts(name: str, tmp_path: Path):
    base = saved(member(name), tmp_path / "base")
    adapted = random_adapter(
        load_base(str(base)), lora_config(EVERYWHERE if name in MIXTURES else ("attention", "dense"), r=2, alpha=3)
    )
    saved(adapted, tmp_path / "adapter")
    twin = PeftModel.from_pretrained(STOCK[name].from_pretrained(base), tmp_path / "adapter", is_trainable=True).eval()
    logits = logits_of(adapted, IDS)
    assert relative(logits, logits_of(twin, IDS)) < ROUNDING
    found, wanted = gradients(adapted), gradients(twin)
    check_gradients(found, {k: v for k, v in wanted.items() if k in found})
    assert all("lora_" in key for key in found)
    again = load_adapter(load_base(str(base)), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again, IDS), logits)

    merge_lora(tmp_path / "adapter", tmp_path / "merged", "bfloat16")
    kinds = {key: tensor.dtype for key, tensor in load_file(tmp_path / "merged" / "model.safetensors").items()}
    assert {kind for key, kind in kinds.items() if not key.endswith(CORRECTION_BIAS)} == {torch.bfloat16}
    assert {kind for key, kind in kinds.items() if key.endswith(CORRECTION_BIAS)} <= {torch.float32}
    merge_lora(tmp_path / "adapter", tmp_path / "wide")
    assert relative(logits_of(stock_twin(tmp_path / "wide", STOCK[name]), IDS), logits) < 1e-5
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["architectures"] == [ARCHITECTURES[name]]
    report = export_adapter(tmp_path / "adapter", tmp_path / "exported", "per_expert", kv_b=True)
    assert report.pairs > 0


@pytest.mark.parametrize("name", ["v3", "moonlight", "plain", "moe"])
def test_logits_are_the_official_codes(name: str):
    defaults = {"norm_topk_prob": False, "topk_method": "greedy", "routed_scaling_factor": 1.0}
    settings = {**defaults, **MEMBERS[name], "rms_norm_eps": 1e-6, "moe_layer_freq": 1}
    model = member(name)
    settings["use_mla"] = model.config.uses_latents
    with torch.no_grad():
        wanted = official.logits(model.state_dict(), settings, IDS[0].tolist())
    assert relative(logits_of(model, IDS)[0], wanted) < 1e-5


def test_other_groups_are_masked_with_0():
    """As in the official code, where an expert with a score below 0 loses to a masked one; in stock it wins. Which of
    the masked ones is chosen is open, so the scores are compared."""
    config, generator = member_config("v3"), torch.Generator().manual_seed(3)
    below = 0
    for _ in range(50):
        scores = torch.rand(1, 16, generator=generator)
        bias = torch.randn(16, generator=generator) - 1.5
        found, wanted = choose_experts(config, scores, bias)[0].tolist(), official.choose((scores + bias)[0], V3)
        kept = official.kept_groups((scores + bias)[0], V3)
        masked = [(scores + bias)[0, e].item() if e // 4 in kept else 0.0 for e in range(16)]
        assert len(set(found)) == 3
        assert sorted(masked[e] for e in found) == sorted(masked[e] for e in wanted)
        below += any(e // 4 not in kept for e in found)
    assert below > 5


def test_the_bias_is_in_the_choice_only():
    model = member("v3")
    with record_routing(model) as routes:
        logits = logits_of(model, IDS)
    for buffer in model.buffers():
        buffer.mul_(-1)
    assert not torch.equal(logits_of(model, IDS), logits)
    with replay_routing(model, routes):
        assert torch.equal(logits_of(model, IDS), logits)


def test_balance_loss():
    """Sequence-wise, f of the chosen and P of the scores divided by their sum (arXiv 2412.19437, eq. 17-20)."""
    config = member_config("v3", aux_loss_alpha=0.5)
    torch.manual_seed(0)
    logits, k = torch.randn(10, 16), 3
    chosen = torch.stack([torch.randperm(16)[:k] for _ in range(10)])
    found = layer_losses(config, RouterOutput(logits, chosen), *sequence_ids((2, 5), None, None, logits.device))
    wanted = 0.0
    for row in (range(5), range(5, 10)):
        for i in range(16):
            f = 16 / (k * 5) * sum(1 for t in row if i in chosen[t].tolist())
            p = sum(logits[t].sigmoid()[i] / logits[t].sigmoid().sum() for t in row) / 5
            wanted = wanted + 0.5 * f * p / 2
    torch.testing.assert_close(found["expert"], wanted)


@pytest.mark.parametrize("name", MIXTURES)
def test_esft_scores(name: str):
    model = member(name)
    shares = score_experts(model, [[5, 6, 7, 8]], pad_token_id=1).shares
    with torch.no_grad():
        router_logits = model.model(torch.tensor([[5, 6, 7, 8]]), output_router_logits=True).router_logits
    assert len(router_logits) == len(shares["gate"]) == 2
    score: Any = torch.sigmoid if model.config.scoring_func == "sigmoid" else partial(torch.softmax, dim=-1)
    for layer, logits in enumerate(router_logits):
        unchosen = score(logits).mean(0).log().isfinite() & (shares["token"][layer] == 0)
        assert (shares["gate"][layer][unchosen] == 0).all() and shares["gate"][layer].sum() == pytest.approx(1)


def test_reward_head(name: str, tmp_path: Path):
    saved(member(name, "score", num_labels=1, pad_token_id=1), tmp_path / "rm")
    rewarded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert type(rewarded).__name__ == ARCHITECTURES[name].replace("CausalLM", "SequenceClassification")
    if STOCK[name] is not stock.DeepseekV3ForCausalLM:
        return  # stock has no such head
    twin = stock.DeepseekV3ForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    with torch.no_grad():
        torch.testing.assert_close(rewarded(IDS).logits, twin(IDS).logits, rtol=1e-5, atol=1e-5)


def test_layers_for_several_tokens_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By their number, and only as many as the config says."""
    base = saved(member("v3"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    extra = {"eh_proj.weight": torch.ones(2, 2), "mlp.experts.0.up_proj.weight": torch.ones(2, 2)}
    save_file(tensors | {f"model.layers.3.{k}": v for k, v in extra.items()}, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"unexpected tensors: model\.layers\.3\.eh_proj"):
        AutoModelForCausalLM.from_pretrained(base)
    edit(base, num_nextn_predict_layers=1)
    capsys.readouterr()
    model = AutoModelForCausalLM.from_pretrained(base)
    assert "left out: model.layers.3.* (2 tensors of multi-token prediction)" in capsys.readouterr().out
    assert torch.equal(logits_of(model.eval(), IDS), logits_of(member("v3"), IDS))
    assert read_settings(str(saved(model, tmp_path / "again"))).num_nextn_predict_layers == 0
    report = merge_lora(base, tmp_path / "copy")
    assert report.left_out == ("model.layers.3.* (2 tensors of multi-token prediction)",)
    assert read_settings(str(tmp_path / "copy")).num_nextn_predict_layers == 0
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() == tensors.keys()


def edit(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scoring_func": "softmax"}, 'DeepSeek-V3 uses "sigmoid"'),
        ({"topk_method": "greedy"}, "noaux_tc"),
        ({"n_group": 16}, "at least 2 of the 16 experts"),
        ({"bias_update_speed": -0.1}, "bias_update_speed is -0.1"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        member_config("v3", **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("glm", {"mlp_layer_types": ["dense", "sparse"]}, "for each of the 3 layers"),
        ("glm", {"mlp_layer_types": ["dense", "sparse", "other"]}, "mlp_layer_types is"),
        ("glm", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("youtu", {"rope_interleave": False}, "rope_interleave is false"),
        ("moe", {"bias_update_speed": 0.001}, "0.001: the routers of DeepSeekMoE have no biases"),
        ("plain", {"bias_update_speed": "0.1"}, "'0.1': the routers of DeepSeek-V2 have no biases"),
        ("moe", {"routed_scaling_factor": 2.0}, "routed_scaling_factor is 2.0"),
        ("youtu", {"bias_update_speed": 0.001}, "bias_update_speed is 0.001: the model has no routed experts"),
    ],
)
def test_settings_of_siblings_that_cannot_work(name: str, settings: dict[str, Any], message: str):
    """Also where a recipe changes them."""
    with pytest.raises(ModelError, match=message):
        member_config(name, **settings)
    with pytest.raises(ModelError, match=rf"model\.config: .*({message}|no setting)"):
        apply_settings(member_config(name), "causal_lm", settings)


@pytest.mark.parametrize(
    ("name", "key", "value", "lacks"),
    [
        ("youtu", "aux_loss_alpha", 0.01, "routed experts"),
        ("youtu", "num_experts_per_tok", 2, "routed experts"),
        ("moe", "kv_lora_rank", 8, "latent attention"),
        ("plain", "v_head_dim", 8, "latent attention"),
    ],
)
def test_changes_without_an_effect(name: str, key: str, value: float, lacks: str):
    """A config.json may have the settings; one that a recipe gives is meant to do something."""
    settings = member_config(name, **{key: value})
    with pytest.raises(ModelError, match=rf"model\.config: {key} is {value}: the model has no {lacks}"):
        apply_settings(settings, "causal_lm", {key: value})
    apply_settings(settings, "causal_lm", {"aux_loss_alpha": 0})
    assert getattr(apply_settings(member_config("v3"), "causal_lm", {key: value}), key) == value


@pytest.mark.parametrize("name", ["glm", "youtu"])
def test_stocks_classes_of_siblings_need_no_warning(name: str):
    assert stock_differences(member_config(name)) == ()


def test_a_dense_model_has_no_experts_to_score():
    with pytest.raises(ModelError, match="no routed experts"):
        score_experts(member("youtu"), [[5, 6]], pad_token_id=1)


def test_a_larger_models_config(tmp_path: Path):
    """Of DeepSeek-VL2 and DeepSeek-OCR: transformers would take the part that is ours."""
    values = {"model_type": "deepseek_vl_v2", "language_config": member_config("plain").to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r'model_type is "deepseek_vl_v2".*language model.*directory of its own'):
        read_settings(str(tmp_path))


def test_the_classes_of_one_architecture_refuse_anothers_files(tmp_path: Path):
    base = saved(member("v3"), tmp_path / "base")
    with pytest.raises(ModelError, match='model_type is "deepseek_v3", not "deepseek_v2"'):
        DeepseekV2ForCausalLM.from_pretrained(base)
    config = copy.deepcopy(read_settings(str(base)))
    assert type(config) is DeepseekV3Config
    with pytest.raises(ModelError, match=r"it takes a deepseek_v2_modeling\.DeepseekV3Config"):
        model_class(config, "causal_lm")(DeepseekV2ForCausalLM.config_class())


def test_a_bias_that_is_not_finite(tmp_path: Path):
    model = member("v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.gate\.e_score_correction_bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
