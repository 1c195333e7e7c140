"""A copy with merged adapters decodes what the adapted model does, and leaves the model as it was."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer

from deepseek_v2_modeling import DeepseekV2ForCausalLM, apply_lora, lora_config
from deepseek_v2_modeling.adapters.copies import copied_bytes, merged_copy
from deepseek_v2_modeling.esft.choice import ExpertChoice

from ..helpers.models import random_ids, small_model

TARGETS = ("attention", "experts", "shared_experts", "dense", "router", "lm_head", "embeddings")


def adapted(targets: Any = TARGETS[:-1], dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A model whose adapters do something."""
    torch.manual_seed(seed)
    model = apply_lora(small_model().to(dtype), lora_config(targets, r=3, alpha=5), **more).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@settings(max_examples=8)
@given(targets=st.sets(st.sampled_from(TARGETS), min_size=1), seed=st.integers(0, 99))
def test_log_probabilities_are_those_of_the_adapted_model(targets: set[str], seed: int):
    model, ids = adapted(sorted(targets), seed=seed), random_ids(2, 9, seed=seed)
    before, wanted = state(model), logits(model, ids).log_softmax(-1)
    copy = merged_copy(model)
    torch.testing.assert_close(logits(copy, ids).log_softmax(-1), wanted, atol=1e-5, rtol=1e-5)
    assert type(copy) is DeepseekV2ForCausalLM
    left = [type(m).__name__ for m in copy.modules() if isinstance(m, LoraLayer)]
    assert left == (["Embedding"] if "embeddings" in targets else [])
    assert_unchanged(model, before)
    assert torch.equal(logits(model, ids).log_softmax(-1), wanted)


def test_only_the_active_adapter_is_merged():
    """As in RL, where the reference is a second adapter."""
    model, ids = adapted(TARGETS[:-2]), random_ids(1, 7)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    before = state(model)
    copy = merged_copy(model)
    torch.testing.assert_close(logits(copy, ids), logits(model, ids), atol=1e-4, rtol=1e-4)
    model.set_adapter("ref")
    assert not torch.allclose(logits(copy, ids), logits(model, ids), atol=1e-2)
    torch.testing.assert_close(logits(merged_copy(model), ids), logits(model, ids), atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(merged_copy(model), ids), logits(model, ids), atol=1e-4, rtol=1e-4)
    model.set_adapter("default")
    assert_unchanged(model, before)


def test_a_copy_that_fails_leaves_nothing_behind():
    model, ids = adapted(TARGETS[:-2]), random_ids(1, 7)
    before, wanted = state(model), logits(model, ids)
    copy = merged_copy(model)
    copy.model.layers[1].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(copy.train(), ids)
    assert not model.training and torch.equal(logits(model, ids), wanted)
    assert_unchanged(model, before)


def test_a_later_copy_has_the_adapters_as_they_are_then():
    model, ids = adapted(("attention", "experts")), random_ids(1, 7)
    first = logits(merged_copy(model), ids)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    second = logits(merged_copy(model), ids)
    assert not torch.allclose(first, second, atol=1e-2)
    torch.testing.assert_close(second, logits(model, ids), atol=1e-4, rtol=1e-4)


def test_what_has_no_adapter_is_shared_and_what_is_copied_is_counted():
    model = adapted(("attention.q", "experts.down"))
    base = model.get_base_model()
    copy = merged_copy(model)
    own = {p.data_ptr() for p in model.parameters()}
    copied = [p for p in copy.parameters() if p.data_ptr() not in own]
    assert {tuple(p.shape) for p in copied} == {(48, 32), (8, 32, 12)}
    assert copied_bytes(model) == sum(p.numel() * p.element_size() for p in copied)
    assert merged_copy(base.model.embed_tokens) is not base.model.embed_tokens and copied_bytes(base.lm_head) == 0


def test_chosen_experts_are_merged_too():
    choice = ExpertChoice({1: (2, 5), 2: (0,)}, "experts.json")
    model, ids = adapted(("experts",), experts=choice), random_ids(2, 9)
    torch.testing.assert_close(logits(merged_copy(model), ids), logits(model, ids), atol=1e-4, rtol=1e-4)


def test_adapters_of_another_kind_stay_adapters():
    model = DeepseekV2ForCausalLM(small_model().config).eval()
    config = LoraConfig(r=2, target_modules=["q_proj", "kv_b_proj"], use_dora=True, init_lora_weights=False)
    dora, ids = PeftModel(model, config).eval(), random_ids(1, 7)
    copy = merged_copy(dora)
    assert any(isinstance(m, LoraLayer) for m in copy.modules()) and copied_bytes(dora) == 0
    torch.testing.assert_close(logits(copy, ids), logits(dora, ids), atol=1e-5, rtol=1e-5)


def test_a_copy_in_another_dtype_is_whole():
    """A bf16 base with float32 adapters, decoded in float32: the sum is not rounded to bf16."""
    model, ids = adapted(("attention", "experts"), dtype=torch.bfloat16), random_ids(2, 9)
    copy = merged_copy(model, torch.float32)
    assert {p.dtype for p in copy.parameters()} == {torch.float32}
    wide = adapted(("attention", "experts"))
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    torch.testing.assert_close(logits(copy, ids), logits(wide, ids), atol=1e-4, rtol=1e-4)
    weights = sum(p.numel() for p in copy.parameters())
    assert copied_bytes(model, torch.float32) == 4 * weights
    assert {p.dtype for p in merged_copy(model).parameters()} == {torch.bfloat16}


def test_tied_weights_stay_tied():
    model = small_model(tie_word_embeddings=True).to(torch.bfloat16)
    copy = merged_copy(model, torch.float32)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight


def test_a_patched_forward_is_not_taken_over():
    """Accelerate's and TRL's, bound to the model itself, would run its adapters again."""
    model, ids = adapted(("attention",)), random_ids(1, 5)
    base = model.get_base_model()
    usual = base.forward
    base.forward = lambda *args, **kwargs: usual(*args, **kwargs)
    copy = merged_copy(model)
    assert "forward" not in vars(copy) and "forward" in vars(base)
    torch.testing.assert_close(logits(copy, ids), logits(model, ids), atol=1e-4, rtol=1e-4)
