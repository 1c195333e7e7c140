"""The config: which forms are read and written, what is refused, and what its settings do."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForCausalLM, ModelError
from deepseek_v2_modeling.layers.moe import DeepseekV2MLP, DeepseekV2MoE, expert_weights
from deepseek_v2_modeling.layers.rope import RotaryEmbedding, inverse_frequencies, softmax_scale

from ..helpers.models import SMALL, YARN, logits_of, random_ids, small_config, small_model, stock_twin

NEW_FORM = {**{k: v for k, v in YARN.items() if k != "type"}, "rope_type": "yarn", "rope_theta": 5000.0}
WITHOUT_ROPE = {key: value for key, value in SMALL.items() if key != "rope_scaling"}


def write_config(directory: Path, **settings: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v2", **WITHOUT_ROPE, **settings}))
    return directory


# Forms of the RoPE settings


def test_both_forms_are_read(tmp_path: Path):
    released = DeepseekV2Config.from_pretrained(write_config(tmp_path, rope_scaling=YARN, rope_theta=5000.0))
    new = DeepseekV2Config.from_pretrained(write_config(tmp_path, rope_parameters=NEW_FORM))
    both = DeepseekV2Config.from_pretrained(
        write_config(tmp_path, rope_scaling=YARN, rope_theta=5000.0, rope_parameters=NEW_FORM)
    )
    assert released.rope_parameters == new.rope_parameters == both.rope_parameters == NEW_FORM


def test_either_key_names_the_type():
    """Files of both ages, and those that have both keys."""
    for keys in ({"type": "yarn"}, {"rope_type": "yarn"}, {"type": "yarn", "rope_type": "yarn"}):
        scaling = {**YARN, **keys}
        del scaling["type"]
        config = small_config(rope_scaling={**scaling, **keys})
        assert config.rope["rope_type"] == "yarn" and config.rope_scaling == YARN
    assert small_config(rope_scaling={"type": "default"}).rope_scaling is None


def test_yarn_without_its_length(tmp_path: Path):
    """Official: 4096, not the length after scaling; and written, so that no reader has to guess."""
    config = small_config(rope_scaling={"type": "yarn", "factor": 40})
    config.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["rope_scaling"]["original_max_position_embeddings"] == 4096
    )
    torch.testing.assert_close(inverse_frequencies(config), inverse_frequencies(small_config()))


@pytest.mark.parametrize("absent", [{}, {"rope_scaling": None, "rope_theta": 10000}])
def test_without_scaling(tmp_path: Path, absent: dict[str, Any]):
    config = DeepseekV2Config.from_pretrained(write_config(tmp_path, **absent))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000}
    assert config.rope_scaling is None
    steps = torch.arange(0, SMALL["qk_rope_head_dim"], 2) / SMALL["qk_rope_head_dim"]
    torch.testing.assert_close(inverse_frequencies(config), 10000.0**-steps)


def test_both_forms_are_written(tmp_path: Path):
    small_config(rope_theta=5000.0).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_scaling"] == YARN
    assert saved["rope_theta"] == 5000.0
    assert saved["rope_parameters"] == NEW_FORM
    assert small_config(rope_theta=5000.0).to_dict()["rope_scaling"] == YARN
    assert saved["model_type"] == "deepseek_v2"
    assert saved["aux_loss_alpha"] == SMALL["aux_loss_alpha"]


def test_written_without_scaling(tmp_path: Path):
    small_config(rope_scaling=None).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_scaling"] is None and saved["rope_theta"] == 10000.0
    assert DeepseekV2Config.from_pretrained(tmp_path).rope_scaling is None


@pytest.mark.parametrize("scaling", [YARN, {"type": "linear", "factor": 3.0}, None])
def test_written_directory_in_stock(tmp_path: Path, scaling: dict[str, Any] | None):
    model, ids = small_model(rope_scaling=scaling, rope_theta=500.0), random_ids(2, 40)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(stock_twin(tmp_path), ids), logits_of(model, ids), rtol=0, atol=1e-5)


def test_rope_settings_as_keywords(tmp_path: Path):
    small_model().save_pretrained(tmp_path)
    linear = {"type": "linear", "factor": 2.0}
    model = DeepseekV2ForCausalLM.from_pretrained(tmp_path, rope_scaling=linear, rope_theta=700.0).eval()
    assert model.config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}
    ids = random_ids(1, 12)
    for form in (linear, {"rope_type": "linear", "factor": 2.0}):  # the new form, with theta left to its default
        found = logits_of(DeepseekV2ForCausalLM.from_pretrained(tmp_path, rope_parameters=form).eval(), ids)
        torch.testing.assert_close(found, logits_of(small_model(rope_scaling=linear), ids))
    wanted = logits_of(small_model(rope_scaling=linear, rope_theta=700.0), ids)
    torch.testing.assert_close(logits_of(model, ids), wanted)
    assert not torch.allclose(wanted, logits_of(small_model(), ids), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {**YARN, "factor": 8}}, ["rope_scaling factor", "8", "40"]),
        ({"rope_scaling": {"type": "linear", "factor": 40}}, ["rope_scaling", "linear"]),
        ({"rope_scaling": {k: v for k, v in YARN.items() if k != "mscale"}}, ["mscale", "None", "0.707"]),
        ({"rope_scaling": None}, ["rope_scaling type", "default", "yarn"]),
        ({"rope_theta": 100.0}, ["rope_theta", "100.0", "5000.0"]),
        ({"rope_parameters": {**NEW_FORM, "factor": 8}}, ["factor", "8", "40"]),
    ],
)
def test_forms_that_disagree_are_refused(tmp_path: Path, changes: dict[str, Any], named: list[str]):
    """Whichever is taken, an edit of the other one would have no effect."""
    small_config(rope_theta=5000.0).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, **changes}))
    with pytest.raises(ModelError) as error:
        DeepseekV2Config.from_pretrained(tmp_path)
    for word in named:
        assert word in str(error.value)


def test_theta_beside_a_new_form_without_it():
    config = DeepseekV2Config(**WITHOUT_ROPE, rope_parameters={"rope_type": "default"}, rope_theta=300.0)
    assert config.rope_theta == 300.0


def test_rope_scaling_is_set_as_a_whole():
    """It is made from `rope_parameters`: what is written into it would be lost."""
    config = small_config()
    scaling: Any = config.rope_scaling
    for change in (
        lambda: scaling.update(factor=8),
        lambda: scaling.__setitem__("factor", 8),
        lambda: scaling.pop("mscale"),
        lambda: scaling.clear(),
    ):
        with pytest.raises(ModelError, match="as a whole"):
            change()
    assert scaling == YARN and json.loads(json.dumps(scaling)) == copy.deepcopy(scaling) == YARN
    config.rope_scaling = {**scaling, "factor": 8}
    assert config.rope["factor"] == 8
    assert type(config.to_dict()["rope_scaling"]) is dict


@pytest.mark.parametrize("change", [{"rope_scaling": {**YARN, "factor": 8}}, {"rope_theta": 100.0}])
def test_rope_settings_of_a_live_model_are_fixed(change: dict[str, Any]):
    model, ids = small_model(), random_ids(1, 4)
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(ModelError, match="live model"):
        logits_of(model, ids)


# YaRN


def official_mscale(scale: float = 1, mscale: float = 1) -> float:
    """modeling_deepseek.py, yarn_get_mscale."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def official_tables(rope: dict[str, Any], dim: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """modeling_deepseek.py, DeepseekV2YarnRotaryEmbedding._set_cos_sin_cache with its defaults; first half only."""
    base, factor = rope.get("rope_theta", 10000), rope["factor"]
    original = rope.get("original_max_position_embeddings", 4096)
    extrapolated = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    interpolated = 1.0 / (factor * base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))

    def correction(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low = max(math.floor(correction(rope.get("beta_fast", 32))), 0)
    high = min(math.ceil(correction(rope.get("beta_slow", 1))), dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1.0 - ramp
    angles = torch.outer(torch.arange(length).float(), interpolated * (1 - kept) + extrapolated * kept)
    magnitude = official_mscale(factor, rope.get("mscale", 1)) / official_mscale(factor, rope.get("mscale_all_dim", 0))
    return angles.cos() * magnitude, angles.sin() * magnitude


def official_softmax_scale(rope: dict[str, Any] | None, qk_dim: int) -> float:
    """modeling_deepseek.py, DeepseekV2Attention.__init__."""
    scale = qk_dim**-0.5
    if rope is not None and rope.get("mscale_all_dim", 0):
        scale *= official_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return scale


CASES = {
    "neither": {},
    "only mscale": {"mscale": 0.707},
    "only mscale_all_dim": {"mscale_all_dim": 0.707},
    "different": {"mscale": 1.0, "mscale_all_dim": 0.5},
    "zero": {"mscale": 0.0, "mscale_all_dim": 0.0},
    "short original": {"mscale": 1.0, "original_max_position_embeddings": 64, "beta_fast": 8, "beta_slow": 2},
    "ramp without width": {"original_max_position_embeddings": 4},
    "factor one": {"factor": 1.0, "mscale_all_dim": 0.707},
}


@pytest.mark.parametrize("case", CASES)
def test_yarn_is_the_official(case: str):
    rope = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, **CASES[case]}
    config = small_config(rope_scaling=rope, qk_rope_head_dim=16, max_position_embeddings=163840)
    found = RotaryEmbedding(config)(torch.arange(50).unsqueeze(0))
    for ours, official in zip(found, official_tables(rope, 16, 50), strict=True):
        torch.testing.assert_close(ours[0], official, rtol=0, atol=1e-6)
    assert softmax_scale(config) == pytest.approx(official_softmax_scale(rope, 8 + 16), rel=1e-12)


@pytest.mark.parametrize("name", ["aux_loss_alpha", "device_aux_loss_alpha", "routed_scaling_factor"])
def test_whole_numbers_are_numbers(tmp_path: Path, name: str):
    """JSON and YAML write 0 and 16 where they mean 0.0 and 16.0."""
    config = DeepseekV2Config.from_pretrained(write_config(tmp_path, **{name: 0}))
    setattr(config, name, 16)
    assert getattr(DeepseekV2Config.from_pretrained(tmp_path, **{name: 16}), name) == getattr(config, name) == 16


# What is refused


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scoring_func": "sigmoid"}, ["scoring_func", "sigmoid", "softmax"]),
        ({"topk_method": "noaux_tc"}, ["topk_method", "noaux_tc", "group_limited_greedy"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "dynamic", "yarn"]),
        ({"rope_scaling": {"type": "yarn"}}, ["yarn", "factor"]),
        ({"moe_layer_freq": 0}, ["moe_layer_freq", "0"]),
        ({"n_group": None}, ["n_group", "group_limited_greedy"]),
        ({"topk_group": None}, ["topk_group", "None"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "8"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok", "0"]),
        ({"n_group": 3}, ["n_group", "3", "8"]),
        ({"topk_group": 5}, ["topk_group", "5", "4"]),
        ({"topk_group": 1}, ["topk_group", "1", "3"]),
        ({"aux_loss_alpha": -0.01}, ["aux_loss_alpha", "-0.01"]),
        ({"bias_update_speed": None}, ["bias_update_speed is None", "a number"]),
        ({"device_aux_loss_alpha": -1}, ["device_aux_loss_alpha", "-1"]),
        ({"comm_aux_loss_alpha": float("nan")}, ["comm_aux_loss_alpha", "nan"]),
    ],
)
def test_refused(tmp_path: Path, settings: dict[str, Any], named: list[str]):
    with pytest.raises(ModelError) as made:
        small_config(**settings)
    with pytest.raises(ModelError) as read:
        DeepseekV2Config.from_pretrained(write_config(tmp_path, rope_theta=10000, **settings))
    for word in named:
        assert word in str(made.value) and word in str(read.value)


def test_refused_as_keyword(tmp_path: Path):
    """Keywords are set on a config that was read, and so checked, without them."""
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="sigmoid"):
        DeepseekV2ForCausalLM.from_pretrained(tmp_path, scoring_func="sigmoid")


def test_a_dense_config_has_no_moe_layer():
    assert not any(small_config(n_routed_experts=None).is_moe_layer(i) for i in range(3))


@pytest.mark.parametrize("dense", [{}, {"n_routed_experts": None}, {"first_k_dense_replace": 9}])
@pytest.mark.parametrize(
    ("setting", "value"), [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("aux_loss_alpha", -0.1)]
)
def test_refused_on_a_live_model(setting: str, value: Any, dense: dict[str, Any]):
    """The config is read at each forward; a dense model says it too, as it does when it is made."""
    with pytest.raises(ModelError, match=f"{setting}.*{value}"):
        small_config(**{setting: value}, **dense)
    model, ids = small_model(**dense), random_ids(1, 4)
    setattr(model.config, setting, value)
    with pytest.raises(ModelError, match=f"{setting}.*{value}"):
        logits_of(model, ids)


# Which layers and parts there are


@pytest.mark.parametrize(
    ("first", "freq", "wanted"),
    [(1, 1, [1, 2, 3, 4]), (0, 2, [0, 2, 4]), (1, 2, [2, 4]), (2, 3, [3]), (0, 1, [0, 1, 2, 3, 4]), (9, 1, [])],
)
def test_moe_layers(first: int, freq: int, wanted: list[int]):
    """Official: i >= first_k_dense_replace and i % moe_layer_freq == 0."""
    config = small_config(first_k_dense_replace=first, moe_layer_freq=freq, num_hidden_layers=5)
    with torch.device("meta"):
        layers = DeepseekV2ForCausalLM(config).model.layers
    assert [i for i, layer in enumerate(layers) if isinstance(layer.mlp, DeepseekV2MoE)] == wanted
    dense = [layer.mlp for layer in layers if isinstance(layer.mlp, DeepseekV2MLP)]
    assert len(dense) == 5 - len(wanted)
    assert all(mlp.up_proj.out_features == SMALL["intermediate_size"] for mlp in dense)


def test_moe_layer_freq_runs_and_round_trips(tmp_path: Path):
    model, ids = small_model(moe_layer_freq=2, first_k_dense_replace=0), random_ids(1, 6)
    model.save_pretrained(tmp_path)
    again = DeepseekV2ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


@pytest.mark.parametrize("none", [None, 0])
def test_without_shared_experts(tmp_path: Path, none: int | None):
    model, ids = small_model(n_shared_experts=none), random_ids(1, 6)
    assert all(layer.mlp.shared_experts is None for layer in model.model.layers[1:])
    assert not any("shared" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    again = DeepseekV2ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


def test_shared_experts_are_one_block_of_their_summed_width():
    model = small_model(n_shared_experts=3)
    assert model.model.layers[1].mlp.shared_experts.gate_proj.out_features == 3 * SMALL["moe_intermediate_size"]


# The experts' weights


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("top_k", [1, 3])
def test_expert_weights(normed: bool, top_k: int):
    """Official: normalised with K > 1 and then not scaled; otherwise scaled."""
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]])
    chosen = torch.tensor([[1, 3, 2], [0, 1, 2]])[:, :top_k]
    config = small_config(norm_topk_prob=normed, routed_scaling_factor=5.0)
    picked = scores.gather(1, chosen)
    wanted = picked / picked.sum(-1, keepdim=True) if normed and top_k > 1 else picked * 5.0
    torch.testing.assert_close(expert_weights(config, scores, chosen), wanted)


@pytest.mark.parametrize("top_k", [1, 3])
def test_norm_topk_prob_changes_the_model(top_k: int):
    ids = random_ids(1, 8)
    plain = logits_of(small_model(num_experts_per_tok=top_k), ids)
    normed = logits_of(small_model(num_experts_per_tok=top_k, norm_topk_prob=True), ids)
    assert torch.equal(plain, normed) == (top_k == 1)


# Settings at run time


def test_settings_as_keywords(tmp_path: Path):
    small_model().save_pretrained(tmp_path)
    model = DeepseekV2ForCausalLM.from_pretrained(
        tmp_path, aux_loss_alpha=0.5, seq_aux=False, device_aux_loss_alpha=0.25, norm_topk_prob=True
    )
    assert (model.config.aux_loss_alpha, model.config.seq_aux) == (0.5, False)
    assert (model.config.device_aux_loss_alpha, model.config.norm_topk_prob) == (0.25, True)
    ids = random_ids(2, 8)
    assert torch.equal(logits_of(model.eval(), ids), logits_of(small_model(norm_topk_prob=True), ids))


@pytest.mark.parametrize(
    "setting",
    [{"norm_topk_prob": True}, {"routed_scaling_factor": 7.0}, {"topk_method": "greedy"}, {"num_experts_per_tok": 2}],
)
def test_settings_are_read_at_each_forward(setting: dict[str, Any]):
    model, ids = small_model(), random_ids(1, 8)
    before = logits_of(model, ids)
    for key, value in setting.items():
        setattr(model.config, key, value)
    after = logits_of(model, ids)
    torch.testing.assert_close(after, logits_of(small_model(**setting), ids))
    assert not torch.allclose(before, after, atol=1e-4)


def test_balance_settings_are_read_at_each_forward():
    model, ids = small_model().train(), random_ids(2, 8)
    before = model(ids, labels=ids).aux_loss.item()
    model.config.aux_loss_alpha *= 3
    assert model(ids, labels=ids).aux_loss.item() == pytest.approx(3 * before)
    model.config.seq_aux = False
    assert model(ids, labels=ids).aux_loss.item() != pytest.approx(3 * before)
    model.config.aux_loss_alpha = 0
    assert model(ids, labels=ids).aux_loss is None
