"""The latent cache in 8, 6 and 4 bits: what it costs, and how near it stays."""

from typing import Any

import pytest
import torch

from deepseek_v2_modeling import LatentCache, ModelError

from ..helpers.models import logits_of, random_ids, small_config, small_model

BITS = {"int8": 8, "int6": 6, "int4": 4}
# Half a step of the largest code, relative to the largest value of a group; "int6" gives some channels five bits.
STEPS = {"int8": 0.5 / 127, "int6": 0.5 / 15, "int4": 0.5 / 7}


@pytest.mark.parametrize("kind", BITS)
def test_error_is_within_half_a_step(kind: Any):
    """The first tokens come back as they were given; all later ones as they were stored."""
    config = small_config(kv_lora_rank=160, qk_rope_head_dim=16)
    torch.manual_seed(0)
    latent, rope_key = torch.randn(2, 1, 6, 160) * 3, torch.randn(2, 1, 6, 16)
    latent[0, 0, 0] = 0
    cache = LatentCache(config, kind)
    first = cache.update(latent[:, :, :5], rope_key[:, :, :5], 0)
    assert torch.equal(first[0], latent[:, :, :5]) and torch.equal(first[1], rope_key[:, :, :5])
    found = cache.update(latent[:, :, 5:], rope_key[:, :, 5:], 0)
    for ours, wanted in zip(found, (latent, rope_key), strict=True):
        assert ours.shape == wanted.shape and ours.dtype == wanted.dtype
        peak = wanted.abs().amax(-1, keepdim=True)
        assert ((ours - wanted).abs() <= peak * STEPS[kind] * 1.05 + 1e-6).all()
        assert not torch.equal(ours, wanted)


DENSE_67B = 95 * 8 * 128 * 2 * 2  # bytes a token: layers, key-value heads, head width, keys and values, 16 bits


@pytest.mark.parametrize("steps", [[1], [10], [64], [1000], [100, *[1] * 60], [5, 300, 1, 1, 1]])
def test_int6_costs_six_bits_a_value_with_everything_counted(steps: list[int]):
    """V2's sizes, the paper's average: 60 layers x 576 values x 6 bits = 25,920 bytes a token, 93.3 % less than
    DeepSeek 67B's. At any length, and while it grows."""
    config = small_config(kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=60)
    cache, tokens = LatentCache(config, "int6"), 0
    for new in steps:
        tokens += new
        cache.update(torch.randn(1, 1, new, 512), torch.randn(1, 1, new, 64), 0)
        a_token = cache.nbytes / tokens * config.num_hidden_layers  # the other layers are empty
        assert 25_500 < a_token <= 25_920
        assert 1 - a_token / DENSE_67B >= 0.933


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bits(kind: Any):
    """At V2's sizes: the bits of the name, and 16 for each group's scale on top."""
    config = small_config(kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=1)
    cache = LatentCache(config, kind)
    cache.update(torch.randn(1, 1, 64, 512), torch.randn(1, 1, 64, 64), 0)
    assert cache.nbytes * 8 / 64 == 576 * BITS[kind] + 5 * 16


@pytest.mark.parametrize("kind", BITS)
def test_decoding(kind: Any):
    """Chunks, tokens, other rows and a crop: near the exact answer, the nearer the more bits."""
    model, ids = small_model(), random_ids(2, 12)
    exact = logits_of(model, ids)
    cache = LatentCache(model.config, kind)
    logits_of(model, ids[:, :8], past_key_values=cache)
    logits_of(model, random_ids(2, 2, seed=7), past_key_values=cache)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    found = torch.cat([logits_of(model, ids[[1, 0], t : t + 1], past_key_values=cache) for t in range(8, 12)], dim=1)
    error = (found - exact[[1, 0], 8:]).norm() / exact[:, 8:].norm()
    assert 0 < error < {"int8": 0.02, "int6": 0.1, "int4": 0.35}[kind]


def test_generate_uses_the_cache_it_is_given():
    model, ids = small_model(), random_ids(1, 6)
    cache = LatentCache(model.config, "int8")
    out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    assert out.past_key_values is cache and cache.get_seq_length() == out.sequences.shape[1] - 1


def test_unknown_kind():
    with pytest.raises(ModelError, match=r"int5.*int8"):
        LatentCache(small_config(), "int5")  # pyright: ignore[reportArgumentType]
