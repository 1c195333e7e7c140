"""A last layer that computes few tokens, and experts that run one after the other: the same as all at once."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v2_modeling import DeepseekV2ForCausalLM
from deepseek_v2_modeling.adapters import apply_lora, lora_config
from deepseek_v2_modeling.layers import moe
from deepseek_v2_modeling.packing.read_layouts import read_layout

from ..helpers.models import random_ids, small_model


def last_hidden(model: Any, **inputs: Any) -> torch.Tensor:
    backbone = model.get_base_model().model if hasattr(model, "peft_config") else model.model
    with torch.no_grad():
        return backbone(use_cache=False, **inputs).last_hidden_state


@st.composite
def trees(draw: Any) -> tuple[list[int], list[int], list[int]]:
    """Lengths of documents, the earlier one that each continues or -1, and columns of the packed row."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    prefixes = [draw(st.integers(-1, place - 1)) for place in range(len(lengths))]
    columns = draw(st.lists(st.integers(0, sum(lengths) - 1), min_size=1, max_size=5))
    return lengths, prefixes, sorted(columns)


@given(trees())
def test_a_read_token_sees_what_it_saw(tree: tuple[list[int], list[int], list[int]]):
    lengths, prefixes, columns = tree
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    begins = [sum(lengths[:place]) for place in range(len(lengths))]
    read = (torch.zeros(len(columns), dtype=torch.int64), torch.tensor(columns))
    layout = read_layout(documents, torch.tensor(prefixes), read)
    queries = torch.cat([bucket.queries.flatten() for bucket in layout.buckets])
    seen = [
        keys[allowed]
        for bucket in layout.buckets
        for keys, mask in zip(bucket.keys, bucket.mask, strict=True)
        for allowed in mask[0]
    ]
    for place, column in enumerate(columns):
        document = int(documents[0, column])
        wanted = list(range(begins[document], column + 1))
        while (document := prefixes[document]) >= 0:
            wanted = [*range(begins[document], begins[document] + lengths[document]), *wanted]
        assert columns[int(queries[layout.places[place]])] == column
        assert seen[int(layout.places[place])].tolist() == wanted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prefixes", [None, [-1, 0, 0, -1]])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_last_layer_computes_the_read_tokens_alone(attention: str, prefixes: list[int] | None, adapted: bool):
    model: Any = small_model(DeepseekV2ForCausalLM, attn_implementation=attention).eval()
    if adapted:
        model = apply_lora(model, lora_config(targets=("attention", "experts", "shared_experts"), r=4, alpha=8))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.1
        model.eval()
    lengths = [7, 4, 3, 6]
    inputs: dict[str, Any] = {
        "input_ids": random_ids(1, sum(lengths)),
        "seq_idx": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None],
    }
    starts = [0, 7, 7, 0] if prefixes else [0] * 4
    positions = [torch.arange(length) + start for length, start in zip(lengths, starts, strict=True)]
    inputs["position_ids"] = torch.cat(positions)[None]
    if prefixes:
        inputs["prefix_documents"] = torch.tensor(prefixes)
    columns = torch.tensor([6, 8, 10, 13, 19, 19])
    whole = last_hidden(model, **inputs)[0, columns]
    seen = []
    hooked = next(module for name, module in model.named_modules() if name.endswith("layers.2.self_attn"))
    hooked.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[1]))
    found = last_hidden(model, **inputs, read=(torch.zeros_like(columns), columns))
    assert seen == [len(columns)] and found.shape[1] == len(columns)
    torch.testing.assert_close(found[0], whole, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_experts_one_after_the_other(adapted: bool, monkeypatch: pytest.MonkeyPatch):
    """On any CPU: oneDNN's products are there, whether they are the faster ones or not."""
    model: Any = small_model(DeepseekV2ForCausalLM).eval()
    if adapted:
        model = apply_lora(model, lora_config(targets=("experts",), r=4, alpha=8)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.1
    ids = random_ids(2, 400)
    monkeypatch.setattr("deepseek_v2_modeling.kernels.float32_products.onednn_is_faster", lambda: False)
    wanted = last_hidden(model, input_ids=ids)
    used = []
    real = moe.one_after_another
    monkeypatch.setattr(moe, "one_after_another", lambda *args: used.append(1) or real(*args))
    monkeypatch.setattr("deepseek_v2_modeling.kernels.float32_products.onednn_is_faster", lambda: True)
    monkeypatch.setattr("deepseek_v2_modeling.kernels.float32_products.WORTH_ONEDNN", 1)
    found = last_hidden(model, input_ids=ids)
    assert used
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
