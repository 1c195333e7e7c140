"""What is plain multi-head attention's own (DeepSeekMoE, `use_mla: false`); test_family.py compares it with stock."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepseek_v2_modeling import LatentCache, ModelError, apply_lora, export_adapter, lora_config
from deepseek_v2_modeling.generation import cache_bytes
from deepseek_v2_modeling.layers.attention_plan import FEW
from deepseek_v2_modeling.loading import LoraSettings, load_base, prepare_trainable, resolve_source, save_directory

from ..helpers.family import member, member_config
from ..helpers.models import left_padded, logits_of, random_adapter, random_ids, relative, small_model, tokenizer

ROUNDING = 3e-6
HEADS = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("v3", {"use_mla": False}, "use_mla is false: for DeepSeek-V3 it must be true"),
        ("moe", {"use_mla": True}, "use_mla is true: for DeepSeekMoE it must be false"),
        ("plain", {"use_mla": None}, "use_mla is null: for DeepSeek-V2 it must be true or false"),
        ("plain", {"use_mla": 0}, "use_mla is 0: for DeepSeek-V2"),
        ("plain", {"use_mla": True, **dict.fromkeys(HEADS, 8)}, "kv_lora_rank is null"),
        ("plain", {"num_key_value_heads": 3}, r"num_key_value_heads is 3: it must divide num_attention_heads \(4\)"),
        ("moe", {"hidden_size": 28}, "the heads' width, hidden_size / num_attention_heads, is 7: it must be even"),
        ("moe", {"rope_scaling": {"type": "yarn", "factor": 4}}, 'rope_scaling type "yarn" is not supported'),
        ("moe", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}, "topk_method"),
        ("moe", {"scoring_func": "sigmoid"}, 'DeepSeekMoE uses "softmax"'),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(name: str, settings: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        member_config(name, **settings)


def test_the_config_is_the_official_one_again(tmp_path: Path):
    """What servers read: no head of width 0, and the sizes of latents as in the released files."""
    for name in ("plain", "moe"):
        member_config(name).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["head_dim"] == 8 and saved["kv_lora_rank"] is None
        assert saved["qk_nope_head_dim"] == saved["qk_rope_head_dim"] == saved["v_head_dim"] == 0
        assert saved.get("use_mla") is (False if name == "plain" else None)
        assert (
            type(member_config(name)).from_pretrained(tmp_path).attention_sizes == member_config(name).attention_sizes
        )
    assert "use_mla" not in small_model().config.to_dict()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_and_packed_batches(attention: str):
    model, ids = member("plain"), random_ids(2, 12)
    model.set_attn_implementation(attention)
    padded, mask, positions = left_padded(ids, [0, 4])
    out = logits_of(model, padded, attention_mask=mask, position_ids=positions)
    assert relative(out[1, 4:], logits_of(model, ids[1:, 4:])[0]) < ROUNDING
    packed = torch.cat((ids[:1, :5], ids[1:]), dim=1)
    restarts = torch.tensor([[*range(5), *range(12)]])
    out = logits_of(model, packed, position_ids=restarts)
    assert relative(out[0, 5:], logits_of(model, ids[1:])[0]) < ROUNDING


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("more", [1, FEW, FEW + 1])
def test_tokens_on_a_cache(attention: str, more: int):
    """As many as are attended by our own code, and one more; left-padded."""
    model, ids = member("plain"), random_ids(2, 4 + more)
    model.set_attn_implementation(attention)
    padded, mask, positions = left_padded(ids, [0, 2])
    wanted = logits_of(model, padded, attention_mask=mask, position_ids=positions)
    cache = LatentCache(model.config)
    logits_of(model, padded[:, :4], attention_mask=mask[:, :4], position_ids=positions[:, :4], past_key_values=cache)
    rest: dict[str, Any] = {"attention_mask": mask, "position_ids": positions[:, 4:], "past_key_values": cache}
    assert relative(logits_of(model, padded[:, 4:], **rest), wanted[:, 4:]) < ROUNDING


def test_the_cache_holds_keys_and_values_of_all_key_heads():
    model = member("plain")
    (latent, rope), layers = model.config.attention_sizes.cached, model.config.num_hidden_layers
    assert (latent, rope) == (2 * 8, 2 * 8)
    cache = model(random_ids(1, 6), use_cache=True).past_key_values
    assert isinstance(cache, LatentCache) and cache.nbytes == layers * 6 * 32 * 4
    assert cache_bytes(model, 64) == layers * 64 * 32 * 4


# LoRA


def names(model: Any) -> set[str]:
    return {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}


def test_the_group_attention_is_that_of_the_model(tmp_path: Path):
    config = lora_config("attention", r=2)
    both, of_q_lora = {"q_proj", "o_proj"}, {"q_a_proj", "q_b_proj"}
    for model, own in ((member("moe"), {"k_proj", "v_proj"}), (small_model(), {"kv_a_proj_with_mqa", "kv_b_proj"})):
        adapted = apply_lora(model, config)
        assert names(adapted) == both | own
        adapted.save_pretrained(str(tmp_path))
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert set(saved["target_modules"]) == both | own | of_q_lora


def test_projections_of_the_other_kind_match_nothing():
    for model, target in ((member("moe"), "attention.kv_b"), (small_model(), "attention.v")):
        with pytest.raises(ModelError, match=f'LoRA target "{target}" matches nothing'):
            apply_lora(model, lora_config(["attention.o", target], r=2))


def test_ranks_of_single_projections():
    """For one kind of attention, as before there were two; and never a part of them."""
    latent = {"attention.q": 1, "attention.kv_a": 2, "attention.kv_b": 3, "attention.o": 4}
    assert names(apply_lora(small_model(), lora_config("attention", r=latent))) >= {"kv_b_proj"}
    plain = {"attention.q": 1, "attention.k": 2, "attention.v": 3, "attention.o": 4}
    adapted = apply_lora(member("moe"), lora_config("attention", r=plain))
    ranks = {n.split(".")[-4]: len(p) for n, p in adapted.named_parameters() if "lora_A" in n}
    assert ranks == {"q_proj": 1, "k_proj": 2, "v_proj": 3, "o_proj": 4}
    with pytest.raises(ModelError, match=r'no value for the LoRA target "attention\.v"'):
        lora_config("attention", r={name: 2 for name in (*latent, "attention.k") if name != "attention.kv_b"})


def test_training_goes_on_with_the_same_adapter(tmp_path: Path):
    lora = LoraSettings(("attention", "experts"), r=2, alpha=3)
    save_directory(member("moe"), tokenizer(), tmp_path / "base")
    first = random_adapter(load_base(str(tmp_path / "base")), lora.config("CAUSAL_LM"))
    save_directory(first, tokenizer(), tmp_path / "adapter")
    again = prepare_trainable(resolve_source(tmp_path / "adapter"), lora=lora, merge_dir=tmp_path / "merged").eval()
    assert not (tmp_path / "merged").exists()
    assert torch.equal(logits_of(again, random_ids(1, 9)), logits_of(first, random_ids(1, 9)))


def test_export_stacks_queries_keys_and_values(tmp_path: Path):
    save_directory(member("moe"), tokenizer(), tmp_path / "base")
    model = random_adapter(load_base(str(tmp_path / "base")), lora_config(["attention.q", "experts"], r=2, alpha=3))
    save_directory(model, tokenizer(), tmp_path / "adapter")
    report = export_adapter(tmp_path / "adapter", tmp_path / "out", "per_expert")
    assert report.zeros == 2 * 3 and not any("q_proj" in note for note in report.notes)
    assert report.warnings == (
        "stock transformers has no class for DeepSeekMoE with plain attention: programs need one of their own for it",
    )


def test_files_have_the_hubs_names(tmp_path: Path):
    save_directory(member("moe"), tokenizer(), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkvo"} < names
    assert "model.layers.2.mlp.experts.7.gate_proj.weight" in names
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "DeepseekForCausalLM"
