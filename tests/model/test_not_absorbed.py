"""What cannot be absorbed into the query and the output is decoded all the same, expanded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, GraloraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model

from deepseek_v2_modeling import LatentCache, lora_config
from deepseek_v2_modeling.loading import load_base

from ..helpers.models import left_padded, logits_of, random_adapter, random_ids, small_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with V2's query projection (q_a, q_b)."""
    directory = tmp_path_factory.mktemp("base")
    small_model(q_lora_rank=12, aux_loss_alpha=0.0).save_pretrained(directory)
    return directory


KV_B: dict[str, Any] = {"target_modules": ["kv_b_proj"]}
NOT_ABSORBED = {
    "DoRA": LoraConfig(r=2, init_lora_weights=False, use_dora=True, **KV_B),
    "bias": LoraConfig(r=2, init_lora_weights=False, lora_bias=True, **KV_B),
    "LoHa": LoHaConfig(r=2, init_weights=False, **KV_B),
    "IA3": IA3Config(feedforward_modules=[], init_ia3_weights=False, **KV_B),
    "GraLoRA": GraloraConfig(r=2, gralora_k=2, init_weights=False, **KV_B),
    "AdaLoRA": AdaLoraConfig(total_step=10, init_lora_weights=False, **KV_B),
    "OFT": OFTConfig(oft_block_size=4, init_weights=False, **KV_B),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", NOT_ABSORBED)
def test_what_cannot_be_absorbed_is_decoded_all_the_same(kind: str, attention: str, base: Path):
    """Else the adapter would be left out of every decoded token without a word."""
    model: Any = get_peft_model(load_base(str(base), attn_implementation=attention), NOT_ABSORBED[kind]).eval()
    if kind == "bias":  # PEFT makes it zero
        torch.nn.init.normal_(model.base_model.model.model.layers[1].self_attn.kv_b_proj.lora_B["default"].bias)
    ids, mask, positions = left_padded(random_ids(2, 9), [0, 3])
    wanted = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    cache, outs = LatentCache(model.config), []
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        outs.append(logits_of(model, ids[:, begin:end], past_key_values=cache, **given))
    found = torch.cat(outs, dim=1)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-4)
    with model.disable_adapter():
        plain = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    assert not torch.allclose(wanted[mask.bool()], plain[mask.bool()], atol=1e-2), "the test proves nothing"


def test_adapter_names_by_row_are_decoded(base: Path):
    model: Any = random_adapter(load_base(str(base)), lora_config(["attention.kv_b"], r=2))
    ids, settings = random_ids(1, 5), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    single = model.generate(input_ids=ids, **settings)
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, **settings)
    assert not torch.equal(single, plain)
    both = model.generate(input_ids=ids.expand(2, -1), adapter_names=["default", "__base__"], **settings)
    assert torch.equal(both, torch.cat((single, plain)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_not_absorbed(dtype: torch.dtype):
    """Their numbers are not what kv_b_proj multiplies by."""

    class Quantised(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(input, self.weight.float() / 64)

    model, ids = small_model(), random_ids(1, 6)
    for layer in model.model.layers:
        old = layer.self_attn.kv_b_proj
        new = layer.self_attn.kv_b_proj = Quantised(old.in_features, old.out_features, bias=False)
        new.weight = torch.nn.Parameter((old.weight * 64).round().to(dtype), requires_grad=False)
    cache = LatentCache(model.config)
    found = torch.cat([logits_of(model, part, past_key_values=cache) for part in ids.split(3, dim=1)], dim=1)
    torch.testing.assert_close(found, logits_of(model, ids), rtol=0, atol=1e-5)
