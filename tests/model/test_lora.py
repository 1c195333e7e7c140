"""LoRA on our classes against stock PEFT on stock transformers, and what PEFT's own switches do to it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora.layer import ParamWrapper

from deepseek_v2_modeling import DeepseekV2ForCausalLM, ModelError, apply_lora, lora_config
from deepseek_v2_modeling.adapters.lora import (
    GROUPS,
    ONLY_IN,
    PROJECTIONS,
    absolute_base,
    adapted_modules,
    check_new_targets,
)
from deepseek_v2_modeling.loading import load_base

from ..helpers.models import SMALL, logits_of, random_adapter, random_ids, shake, small_model, stock_twin

EVERYWHERE = ["attention", "experts", "shared_experts", "dense", "router"]
CASES: dict[str, dict[str, Any]] = {
    **{target: {"targets": [target]} for target in EVERYWHERE},
    "everywhere": {"targets": EVERYWHERE},
    "single projections": {"targets": ["attention.kv_b", "experts.down", "router"]},
    "ranks and alphas": {
        "targets": EVERYWHERE,
        "r": {
            "attention": 2,
            "attention.q": 3,
            "experts": 1,
            "experts.down": 4,
            "shared_experts": 2,
            "dense": 5,
            "router": 1,
        },
        "alpha": {"attention": 1, "experts": 7, "shared_experts": 2.5, "dense": 3, "router": 4},
    },
    "rank-stabilised": {"targets": EVERYWHERE, "r": 3, "alpha": 5, "rslora": True},
}
NO_BALANCE = {"aux_loss_alpha": 0.0, "attn_implementation": "eager"}


def config_of(case: str) -> Any:
    return lora_config(**{"r": 2, **CASES[case]})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with V2's query projection (q_a, q_b)."""
    directory = tmp_path_factory.mktemp("base")
    small_model(q_lora_rank=12, **NO_BALANCE).save_pretrained(directory)
    return directory


def ours(base: Path, config: Any) -> Any:
    return random_adapter(load_base(str(base), attn_implementation="eager"), config)


def plain_logits(base: Path, ids: torch.Tensor) -> torch.Tensor:
    return logits_of(load_base(str(base), attn_implementation="eager").eval(), ids)


def stocks(base: Path, config: Any) -> Any:
    """Stock PEFT's wrappers and forward on the stock model, with the same adapter weights."""
    model = get_peft_model(stock_twin(base), config)
    shake(model, seed=3)
    return model


# Against stock


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_stock_pefts(base: Path, case: str):
    ids, results = random_ids(2, 9), []
    for model in (ours(base, config_of(case)), stocks(base, config_of(case))):
        model.train()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((out, grads))
    (found, grads), (wanted, stock_grads) = results
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=0, atol=1e-6)
    assert set(grads) == set(stock_grads) and all("lora_" in name for name in grads)
    for name, grad in stock_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.allclose(found.logits, plain_logits(base, ids), atol=1e-3)


def test_expert_wrappers_never_run(base: Path, monkeypatch: pytest.MonkeyPatch):
    """PEFT's forward of a wrapped parameter makes W + s B A of all experts."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("ParamWrapper.forward was called")

    model, ids = ours(base, config_of("everywhere")), random_ids(1, 5)
    monkeypatch.setattr(ParamWrapper, "forward", fail)
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("case", [*CASES, "with embeddings"])
def test_saved_adapter_in_stock(base: Path, tmp_path: Path, case: str):
    config = lora_config([*EVERYWHERE, "embeddings", "lm_head"], r=2) if case == "with embeddings" else config_of(case)
    model, ids = ours(base, config), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    found = logits_of(PeftModel.from_pretrained(stock_twin(base), str(tmp_path)).eval(), ids)
    torch.testing.assert_close(found, logits_of(model, ids), rtol=0, atol=1e-5)
    assert not torch.allclose(found, plain_logits(base, ids), atol=1e-3)

    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved["lora_dropout"] == 0 and saved["task_type"] == "CAUSAL_LM"
    assert saved["base_model_name_or_path"] == str(base)


def test_adapter_of_stock_peft_in_ours(base: Path, tmp_path: Path):
    model, ids = stocks(base, config_of("everywhere")).eval(), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    found = PeftModel.from_pretrained(load_base(str(base)), str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(found, ids), logits_of(model, ids), rtol=0, atol=1e-5)


# PEFT's switches


def test_a_fresh_adapter_changes_nothing(base: Path):
    plain, ids = load_base(str(base)).eval(), random_ids(2, 9)
    wanted = logits_of(plain, ids)
    model = apply_lora(plain, config_of("everywhere")).eval()
    assert type(model).__name__ == "PeftModelForCausalLM" and isinstance(model, PeftModel)
    # Without adapters, experts with few rows are multiplied in another order.
    torch.testing.assert_close(logits_of(model, ids), wanted, rtol=0, atol=1e-6)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_disable_adapter(base: Path):
    model, ids = ours(base, config_of("everywhere")), random_ids(2, 9)
    plain, adapted = plain_logits(base, ids), logits_of(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, ids), plain)
    assert torch.equal(logits_of(model, ids), adapted)
    assert not torch.allclose(plain, adapted, atol=1e-3)


def test_two_adapters(base: Path):
    """Each alone, then both at once: the same as stock's."""
    ids, found = random_ids(2, 9), []
    for model in (ours(base, config_of("everywhere")), stocks(base, config_of("everywhere"))):
        model.add_adapter("other", config_of("everywhere"))
        shake(model, seed=8, adapter="other")
        logits = []
        for active in ("default", "other", ["default", "other"], "default"):
            model.base_model.set_adapter(active)
            logits.append(logits_of(model.eval(), ids))
        found.append(logits)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert torch.equal(found[0][0], found[0][3])
    assert not torch.allclose(found[0][0], found[0][1], atol=1e-3)
    assert not torch.allclose(found[0][1], found[0][2], atol=1e-3)


def test_only_the_active_adapter_gets_gradients(base: Path):
    model, ids = ours(base, config_of("everywhere")), random_ids(1, 9)
    model.add_adapter("other", config_of("everywhere"))
    model.set_adapter("other")
    model(input_ids=ids, labels=ids).loss.backward()
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None} == {"other"}


def test_merge(base: Path, tmp_path: Path):
    model, ids = ours(base, config_of("ranks and alphas")), random_ids(2, 9)
    wanted = logits_of(model, ids)
    merged = model.merge_and_unload()
    assert type(merged) is DeepseekV2ForCausalLM
    assert set(merged.state_dict()) == set(load_base(str(base)).state_dict())
    torch.testing.assert_close(logits_of(merged, ids), wanted, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(stock_twin(tmp_path), ids), wanted, rtol=0, atol=1e-5)


def test_merged_in_place(base: Path):
    """TRL merges for a rollout and takes the adapter out again; a disabled adapter is taken out too."""
    model, ids = ours(base, config_of("everywhere")), random_ids(2, 9)
    wanted, plain = logits_of(model, ids), plain_logits(base, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model, ids), wanted, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model, ids), wanted, rtol=0, atol=1e-5)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, ids), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of(model, ids), wanted, rtol=0, atol=1e-5)


def test_gradient_checkpointing(base: Path):
    ids, grads = random_ids(2, 9), []
    for checkpointing in (False, True):
        model = ours(base, config_of("everywhere")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_autocast_on_a_bfloat16_base(base: Path):
    """PEFT makes adapters float32 on a bf16 base; under autocast and without it the product is bf16's."""
    model = ours(base, config_of("everywhere"))
    ids, wanted = random_ids(2, 9), logits_of(model, random_ids(2, 9))
    half = random_adapter(load_base(str(base), dtype="bfloat16"), config_of("everywhere"))
    assert {p.dtype for name, p in half.named_parameters() if "lora_" in name} == {torch.float32}
    logits = half(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), wanted, rtol=0, atol=0.15)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = half(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.logits.float(), wanted, rtol=0, atol=0.15)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in half.parameters() if p.requires_grad)


# Dropout


@pytest.mark.parametrize("target", [*EVERYWHERE, "lm_head"])
def test_dropout_acts_in_training_only(base: Path, target: str):
    config, ids = lora_config([target], r=2), random_ids(1, 9)
    model = random_adapter(load_base(str(base), attn_implementation="eager"), config, dropout=0.5)
    without = ours(base, config)
    assert torch.equal(logits_of(model, ids), logits_of(without, ids))
    assert torch.equal(logits_of(without.train(), ids), logits_of(without.eval(), ids))
    first, second = logits_of(model.train(), ids), logits_of(model, ids)
    assert not torch.allclose(first, logits_of(without, ids), atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-4)


def test_dropout_of_the_config(base: Path, tmp_path: Path):
    """`lora_config` keeps it for `apply_lora`, beside the fields that are written; an argument wins."""
    config = lora_config(["attention", "experts", "embeddings"], r=2, dropout=0.25)
    assert config.lora_dropout == 0
    model = apply_lora(load_base(str(base)), config)
    dropouts = {row["projection"]: row["dropout"] for row in adapted_modules(model)}
    assert dropouts.pop("embed_tokens") == 0  # PEFT's forward has none there
    assert set(dropouts.values()) == {0.25}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["lora_dropout"] == 0 and "runtime_dropout" not in saved
    other = adapted_modules(apply_lora(load_base(str(base)), config, 0.5))
    assert {row["dropout"] for row in other} == {0, 0.5}


def test_dropout_is_not_on_disk(base: Path, tmp_path: Path):
    """Stock PEFT refuses another value than 0 for experts."""
    model = random_adapter(load_base(str(base)), config_of("everywhere"), dropout=0.5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0


# Targets, ranks and alphas


def table(model: Any) -> dict[str, dict[str, Any]]:
    return {row["projection"]: row for row in adapted_modules(model)}


def test_table_of_adapted_modules(base: Path):
    model = ours(base, config_of("ranks and alphas"))
    rows = table(model)
    assert set(rows) == {
        *(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
        *("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"),
    }
    assert rows["mlp.experts.gate_up_proj"]["scaling"] == 7 and rows["mlp.experts.gate_up_proj"]["dropout"] == 0
    found = {name: (row["layers"], row["rank"], row["alpha"]) for name, row in rows.items()}
    assert found["self_attn.q_b_proj"] == (3, 3, 1) and found["self_attn.o_proj"] == (3, 2, 1)
    assert found["mlp.experts.gate_up_proj"] == (2, 1, 7) and found["mlp.experts.down_proj"] == (2, 4, 7)
    assert found["mlp.shared_experts.up_proj.weight"] == (2, 2, 2.5)
    assert found["mlp.up_proj.weight"] == (1, 5, 3) and found["mlp.gate.weight"] == (2, 1, 4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row["parameters"] for row in rows.values()) == trained
    experts, width, hidden = SMALL["n_routed_experts"], SMALL["moe_intermediate_size"], SMALL["hidden_size"]
    assert rows["mlp.experts.down_proj"]["parameters"] == 2 * experts * 4 * (width + hidden)


@pytest.mark.parametrize("target", [n for n in (*GROUPS, *PROJECTIONS) if n not in ONLY_IN[False]])
def test_a_target_adapts_what_it_says_and_nothing_else(base: Path, target: str):
    parts = {
        "attention": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
        "attention.q": {"q_a_proj", "q_b_proj"},
        "attention.kv_a": {"kv_a_proj_with_mqa"},
        "attention.kv_b": {"kv_b_proj"},
        "attention.o": {"o_proj"},
        "experts": {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
        "experts.gate_up": {"mlp.experts.gate_up_proj"},
        "experts.down": {"mlp.experts.down_proj"},
        "shared_experts": {f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")},
        "dense": {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
        "router": {"mlp.gate.weight"},
        "embeddings": {"embed_tokens"},
        "lm_head": {"lm_head"},
    }
    rows = table(apply_lora(load_base(str(base)), lora_config([target], r=2)))
    assert {name.removeprefix("self_attn.") for name in rows} == parts[target]


def test_query_projection_without_q_lora():
    rows = table(apply_lora(small_model(), lora_config(["attention.q"], r=2)))
    assert set(rows) == {"self_attn.q_proj"}


def test_peft_does_not_call_the_ranks_of_parameters_ignored(recwarn: pytest.WarningsRecorder):
    model = apply_lora(small_model(), lora_config(["attention", "experts"], r={"attention": 2, "experts": 3}))
    assert table(model)["mlp.experts.down_proj"]["rank"] == 3
    assert not [w for w in recwarn if "pattern" in str(w.message)]


def test_scaling():
    """alpha / r, or alpha / sqrt(r); alpha is 2 r where nothing is said."""
    assert lora_config(["experts"], r=4).lora_alpha == 8
    per_target = lora_config(["attention", "experts"], r={"attention": 4, "experts": 2})
    scalings: dict[str, float] = {}
    for config in (per_target, lora_config(["router", "experts"], r=4, alpha=6, rslora=True)):
        for name, module in apply_lora(small_model(), config).named_modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict) and "layers.1." in name:
                scalings[name.split("layers.1.")[1]] = module.scaling["default"]
    assert scalings["self_attn.o_proj"] == 2 and scalings["mlp.gate"] == 3
    assert scalings["mlp.experts"] == 3


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("router", {"n_routed_experts": None}),
        ("experts", {"n_routed_experts": None}),
        ("shared_experts", {"n_shared_experts": None}),
        ("dense", {"first_k_dense_replace": 0}),
    ],
)
def test_target_that_matches_nothing(target: str, changes: dict[str, Any]):
    """PEFT says nothing when at least one target matches."""
    with pytest.raises(ModelError, match=target):
        apply_lora(small_model(**changes), lora_config(["attention", target], r=2))


@pytest.mark.parametrize("target", ["embeddings", "lm_head"])
def test_a_target_that_is_tied(target: str):
    """Its adapter could be trained, but not merged."""
    model = small_model(tie_word_embeddings=True)
    with pytest.raises(ModelError, match=f'"{target}".*tie_word_embeddings'):
        apply_lora(model, lora_config(["attention", target], r=2))
    with pytest.raises(ModelError, match=f'"{target}".*tie_word_embeddings'):
        check_new_targets(model, lora_config([target], r=2))
    apply_lora(model, lora_config(["attention"], r=2))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"targets": ["experts", "gate_proj"]}, "gate_proj"),
        ({"targets": []}, "target"),
        ({"targets": ["attention"], "r": {"experts": 2}}, "experts"),
        ({"targets": ["attention"], "r": {"attention": 2, "router": 2}}, "router"),
        ({"targets": ["attention", "experts"], "r": {"attention": 2}}, "experts"),
        ({"targets": ["attention"], "alpha": {"attention": 2, "elsewhere": 1}}, "elsewhere"),
        ({"targets": ["attention"], "r": 0}, "rank"),
        ({"targets": ["attention"], "r": 2.9}, "rank .* is 2.9: it must be a whole number"),
        ({"targets": ["attention"], "alpha": -1}, "alpha .* is -1"),
        ({"targets": ["attention"], "alpha": {"attention": math.nan}}, "alpha .* is nan"),
        ({"targets": ["attention"], "dropout": 1}, "dropout is 1"),
        ({"targets": "attentions"}, '"attentions"'),
    ],
)
def test_wrong_settings(settings: dict[str, Any], named: str):
    with pytest.raises(ModelError, match=named):
        lora_config(**settings)


def test_one_target_as_text():
    assert lora_config("attention").target_modules == lora_config(["attention"]).target_modules


def test_models_that_cannot_be_adapted(base: Path):
    config = lora_config("attention.o", r=2)
    model = apply_lora(load_base(str(base)), config)
    for adapted in (model, model.get_base_model()):
        with pytest.raises(ModelError, match="adapters already"):
            apply_lora(adapted, config)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match=r"modeling_deepseek_v2\.DeepseekV2ForCausalLM is not a model of this package"):
        apply_lora(stock_twin(base), config)


def test_the_base_is_found_from_anywhere(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(base.parent)
    apply_lora(load_base(base.name), lora_config("attention.o", r=2)).save_pretrained(str(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path)
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert AutoPeftModelForCausalLM.from_pretrained("adapter").active_adapter == "default"
    assert absolute_base("deepseek-ai/DeepSeek-V2-Lite") == "deepseek-ai/DeepSeek-V2-Lite"


def test_adapter_tensors_are_in_pefts_layout(base: Path):
    """A is [E r, in] with the expert slowest, B is [out, r E] with the expert fastest: one expert's change is
    the product of its own factors."""
    model = random_adapter(load_base(str(base)), lora_config(["experts.down"], r=2, alpha=2))
    state = get_peft_model_state_dict(model)
    prefix = "base_model.model.model.layers.1.mlp.experts."
    a, b = state[f"{prefix}lora_A.weight"], state[f"{prefix}lora_B.weight"]
    experts, width, hidden = SMALL["n_routed_experts"], SMALL["moe_intermediate_size"], SMALL["hidden_size"]
    assert a.shape == (experts * 2, width) and b.shape == (hidden, 2 * experts)
    before = load_base(str(base)).model.layers[1].mlp.experts.down_proj
    after = model.merge_and_unload().model.layers[1].mlp.experts.down_proj
    for e in range(experts):
        torch.testing.assert_close(after[e] - before[e], b[:, e::experts] @ a[2 * e : 2 * e + 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"lora_bias": True}])
def test_what_only_peft_computes_is_left_to_it(extra: dict[str, Any], base: Path):
    """DoRA and the like on attention: our low-rank path must not take them for plain LoRA."""
    config = LoraConfig(r=2, target_modules=["o_proj", "q_b_proj"], init_lora_weights=False, **extra)
    model = get_peft_model(load_base(str(base), attn_implementation="eager"), config).eval()
    twin = get_peft_model(stock_twin(base), config).eval()
    for peft_model in (model, twin):
        shake(peft_model, seed=3)
    ids = random_ids(2, 7)
    torch.testing.assert_close(logits_of(model, ids), logits_of(twin, ids), rtol=1e-4, atol=1e-5)


def test_adapter_names_by_row_are_left_to_peft(base: Path):
    """PEFT hands the names on by hooks on the wrappers."""
    model = random_adapter(load_base(str(base), attn_implementation="eager"), lora_config(["attention"], r=2))
    ids = random_ids(2, 7)
    mixed = logits_of(model, ids, adapter_names=["default", "__base__"])
    with model.disable_adapter():
        plain = logits_of(model, ids)
    torch.testing.assert_close(mixed[0], logits_of(model, ids)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], plain[1], rtol=1e-4, atol=1e-5)


def test_one_routed_expert():
    """PEFT's layout of one expert is still that of experts."""
    changes = {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    model = random_adapter(small_model(**changes), lora_config(["experts"], r=2))
    ids = random_ids(1, 5)
    found = logits_of(model, ids)
    torch.testing.assert_close(found, logits_of(model.merge_and_unload(), ids), rtol=1e-4, atol=1e-5)
