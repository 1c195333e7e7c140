"""Decoding with the latent cache against full forwards, on both ways of attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from deepseek_v2_modeling import LatentCache, apply_lora, lora_config
from deepseek_v2_modeling.cache import joined
from deepseek_v2_modeling.layers.attention import by_row
from deepseek_v2_modeling.layers.attention_plan import absorption_pays

from ..helpers.models import SMALL, left_padded, logits_of, random_ids, small_config, small_model, stock_twin

CLOSE = {"rtol": 0, "atol": 1e-5}
CHUNKS = {
    "token by token": [1] * 12,
    "prefill and tokens": [7, 1, 1, 1, 1, 1],
    "chunks": [4, 5, 3],
    "uneven": [1, 9, 2],
}


@pytest.fixture(params=["absorbed", "expanded"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of attention over cached tokens, whatever the number of new ones; counts that it was taken."""
    from deepseek_v2_modeling.layers import attention_plan as masks

    monkeypatch.setattr(masks, "absorption_pays", lambda config, queries: request.param == "absorbed")
    return request.param


@torch.no_grad()
def decode(
    model: Any,
    ids: torch.Tensor,
    chunks: list[int],
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cache: LatentCache | None = None,
) -> torch.Tensor:
    """Logits of all tokens, made chunk by chunk with a cache. mask covers the cached tokens too."""
    cache, outs, begin = cache or LatentCache(model.config), [], 0
    past = cache.get_seq_length()
    for count in chunks:
        end = begin + count
        inputs: dict[str, Any] = {"attention_mask": None if mask is None else mask[:, : past + end]}
        if positions is not None:
            inputs["position_ids"] = positions[:, begin:end]
        outs.append(model(ids[:, begin:end], past_key_values=cache, **inputs).logits)
        begin = end
    assert begin == ids.shape[1] and cache.get_seq_length() == past + begin
    return torch.cat(outs, dim=1)


def filled(model: Any, ids: torch.Tensor) -> LatentCache:
    cache = LatentCache(model.config)
    logits_of(model, ids, past_key_values=cache)
    return cache


# Cached equals full


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_cached_decoding_is_the_full_forward(way: str, chunks: str, attention: str):
    model, ids = small_model(q_lora_rank=12, attn_implementation=attention), random_ids(2, 12)
    full = logits_of(model, ids, use_cache=False)
    torch.testing.assert_close(decode(model, ids, CHUNKS[chunks]), full, **CLOSE)


def test_the_two_ways_are_both_taken(monkeypatch: pytest.MonkeyPatch):
    """Decoding is absorbed, a long chunk on a cache is expanded; and the way forced above is the way taken."""
    model, ids = small_model(kv_lora_rank=16), random_ids(1, 64)
    taken: list[bool] = []
    attention = type(model.model.layers[0].self_attn)
    absorbed = attention.absorbed
    monkeypatch.setattr(attention, "absorbed", lambda *args: taken.append(True) or absorbed(*args))
    decode(model, ids, [10, 54])
    assert not taken
    decode(model, ids[:, :12], [10, 1, 1])
    assert len(taken) == 2 * SMALL["num_hidden_layers"]


def test_absorption_pays_for_few_queries():
    """V2's sizes: it costs C (N + V) once per cached token to expand, and 2C - N - V more a pair to absorb."""
    config = small_model(kv_lora_rank=512, qk_nope_head_dim=128, v_head_dim=128, num_hidden_layers=1).config
    threshold = 512 * 256 / (1024 - 256)
    assert absorption_pays(config, 1) and absorption_pays(config, int(threshold))
    assert not absorption_pays(config, int(threshold) + 1)


@pytest.mark.parametrize("value_width", [4, 12, 20])
def test_any_value_width(way: str, value_width: int):
    """Narrower than, as wide as and wider than queries and keys (12)."""
    model, ids = small_model(v_head_dim=value_width, attn_implementation="sdpa"), random_ids(1, 8)
    torch.testing.assert_close(decode(model, ids, [5, 1, 2]), logits_of(model, ids), **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("chunks", ["token by token", "prefill and tokens", "chunks"])
def test_left_padding(way: str, chunks: str, attention: str):
    """Equal to the full forward, and to each row without its padding."""
    model, plain = small_model(attn_implementation=attention), random_ids(3, 12)
    pads = [0, 5, 2]
    ids, mask, positions = left_padded(plain, pads)
    found = decode(model, ids, CHUNKS[chunks], mask, positions)
    full = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[mask.bool()], full[mask.bool()], **CLOSE)
    for row, count in enumerate(pads):
        alone = logits_of(model, ids[row : row + 1, count:])
        torch.testing.assert_close(found[row : row + 1, count:], alone, **CLOSE)


def test_lora_on_kv_b_proj(way: str):
    torch.manual_seed(0)
    model = apply_lora(small_model(), lora_config(["attention.kv_b", "attention.q"], r=3)).eval()
    ids, before = random_ids(2, 12), logits_of(small_model(), random_ids(2, 12))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    full = logits_of(model, ids, use_cache=False)
    assert not torch.allclose(full, before, atol=1e-2)
    torch.testing.assert_close(decode(model, ids, CHUNKS["prefill and tokens"]), full, **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(decode(model, ids, CHUNKS["prefill and tokens"]), before, **CLOSE)


def test_after_a_training_step(way: str):
    """Nothing that absorption makes of the weights outlives a change of them."""
    model, ids = small_model(), random_ids(2, 12)
    decode(model, ids, [6, *[1] * 6])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(ids, labels=ids).loss.backward()
    before = logits_of(model.eval(), ids)
    optimizer.step()
    full = logits_of(model, ids)
    assert not torch.allclose(full, before, atol=1e-2)
    torch.testing.assert_close(decode(model, ids, [6, *[1] * 6]), full, **CLOSE)


def test_a_cache_does_not_change_training():
    """`use_cache` is on by default, in training too."""
    ids, grads = random_ids(2, 10), []
    for use_cache in (True, False):
        model = small_model().train()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


# The cache itself


def test_update_returns_all_tokens_so_far():
    config = small_model().config
    cache, wanted = LatentCache(config), []
    for step, count in enumerate([3, 1, 100, 1]):
        latent = torch.randn(2, 1, count, config.kv_lora_rank)
        rope_key = torch.randn(2, 1, count, config.qk_rope_head_dim)
        wanted.append((latent, rope_key))
        for layer in range(config.num_hidden_layers):
            found = cache.update(latent + layer, rope_key - layer, layer)
            for ours, parts, sign in zip(found, zip(*wanted, strict=True), (1, -1), strict=True):
                torch.testing.assert_close(ours, torch.cat(parts, dim=2) + sign * layer)
        assert cache.get_seq_length() == sum((3, 1, 100, 1)[: step + 1])


def test_crop(way: str):
    model, ids = small_model(), random_ids(2, 14)
    cache = filled(model, ids[:, :9])
    cache.crop(-4)
    assert cache.get_seq_length() == 5
    other = random_ids(2, 6, seed=2)
    wanted = logits_of(model, torch.cat((ids[:, :5], other), dim=1))[:, 5:]
    torch.testing.assert_close(decode(model, other, [2, 1, 3], cache=cache), wanted, **CLOSE)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    ],
)
def test_rows_change(way: str, change: Any, rows: list[int]):
    """Twice, with tokens in between: the second time on a cache that had moved."""
    model, ids = small_model(), random_ids(3, 6)
    cache = filled(model, ids)
    change(cache)
    so_far = ids[rows]
    for seed in (5, 6):
        new = random_ids(len(rows), 3, seed=seed)
        so_far = torch.cat((so_far, new), dim=1)
        wanted = logits_of(model, so_far)[:, -3:]
        torch.testing.assert_close(decode(model, new, [1, 2], cache=cache), wanted, **CLOSE)
        if len(rows) == 3:
            change(cache)
            so_far = so_far[rows]


def test_reset():
    model, ids = small_model(), random_ids(2, 6)
    cache = filled(model, random_ids(2, 9, seed=4))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    torch.testing.assert_close(decode(model, ids, [4, 1, 1], cache=cache), logits_of(model, ids), **CLOSE)


def storage_of(cache: LatentCache) -> int:
    """Bytes of all tensors that hang on the cache's layers, whatever they are called."""
    held: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(held.values())


def test_nbytes():
    """All storage is counted, and there is room for latents and rotary keys, not for expanded keys and values."""
    model = small_model()
    config, tokens = model.config, 2 * 400
    cache = LatentCache(config)
    assert cache.nbytes == 0
    decode(model, random_ids(2, 400), [300, 99, 1], cache=cache)
    needed = tokens * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 4
    assert cache.nbytes == storage_of(cache)
    assert needed <= cache.nbytes <= 1.3 * needed
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.nbytes == storage_of(cache) >= needed


# Generation


GREEDY = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 1}


def test_generate_makes_a_latent_cache():
    model, ids = small_model(), random_ids(2, 5)
    out = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, LatentCache)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    mine = LatentCache(model.config)
    out = model.generate(ids, **GREEDY, past_key_values=mine, return_dict_in_generate=True)
    assert out.past_key_values is mine


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy(way: str, attention: str):
    model = small_model(attn_implementation=attention)
    ids, mask, _ = left_padded(random_ids(3, 8), [0, 3, 1])
    cached = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, **GREEDY, use_cache=False))
    assert (cached[:, 8:] != cached[:, 8:9]).any(), "a constant answer would prove little"


@pytest.mark.parametrize("sampled", [False, True])
def test_left_padding_changes_no_answer(sampled: bool):
    """Each row answers as it does alone; sampled with one seed, from the most likely token only."""
    model, plain = small_model(eos_token_id=None), random_ids(3, 8)
    pads = [0, 3, 6]
    ids, mask, _ = left_padded(plain, pads)
    settings = {**GREEDY, "do_sample": sampled} | ({"top_k": 1} if sampled else {})
    found = model.generate(ids, attention_mask=mask, **settings)
    for row, count in enumerate(pads):
        alone = model.generate(plain[row : row + 1, count:], **settings)
        assert torch.equal(found[row, 8:], alone[0, 8 - count :])


@pytest.mark.parametrize("reentrant", [True, False])
def test_generation_in_training_with_checkpointing(reentrant: bool):
    """Transformers' checkpointed layers drop the cache that they are given."""
    model, ids = small_model(), random_ids(2, 5)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **settings)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(model.generate(ids, **settings), wanted)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_checkpointing_on_a_cache():
    """A second run of a layer in the backward pass would fill the cache again."""
    ids, grads = random_ids(2, 9), []
    for checkpointing in (False, True):
        model = small_model()
        cache = filled(model, ids[:, :4])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(ids[:, 4:], labels=ids[:, 4:], past_key_values=cache).loss.backward()
        assert cache.get_seq_length() == 9
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_generation_goes_on_from_a_cache():
    model, ids = small_model(eos_token_id=None), random_ids(1, 6)
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, random_ids(1, 3, seed=9)), dim=1)
    again = model.generate(longer, **GREEDY, past_key_values=first.past_key_values)
    assert torch.equal(again, model.generate(longer, **GREEDY))


def test_sampling_with_a_seed():
    model, ids = small_model(), random_ids(2, 6)
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 12, "pad_token_id": 1}

    def sample(seed: int, **kwargs: Any) -> list[list[int]]:
        set_seed(seed)
        return model.generate(ids, **sampling, **kwargs).tolist()

    assert sample(3) == sample(3) == sample(3, use_cache=False) != sample(4)


def test_beams_are_stocks(tmp_path: Path):
    model = small_model()
    model.save_pretrained(tmp_path)
    ids, mask, _ = left_padded(random_ids(2, 7), [0, 3])
    beams = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    found = model.generate(ids, attention_mask=mask, **beams)
    assert torch.equal(found, stock_twin(tmp_path).generate(ids, attention_mask=mask, **beams))


@pytest.mark.parametrize("kind", ["assistant", "prompt lookup"])
def test_assisted_generation_is_greedy(kind: str):
    """Rejected guesses are cropped off the cache."""
    model, ids = small_model(), random_ids(1, 6)
    helper = small_model()
    torch.nn.init.normal_(helper.lm_head.weight, std=0.01)
    helper.lm_head.weight.data += model.lm_head.weight.data  # often right, not always
    extra: dict[str, Any] = {"assistant_model": helper} if kind == "assistant" else {"prompt_lookup_num_tokens": 3}
    found = model.generate(ids, **{**GREEDY, "max_new_tokens": 20}, **extra)
    assert torch.equal(found, model.generate(ids, **{**GREEDY, "max_new_tokens": 20}))


def test_joined_reads_the_cache_where_it_lies():
    """Decoding copies no latents: the joined keys are the cache's own memory, and equal to latents beside keys."""
    cache = LatentCache(small_config())
    for length in (5, 1):
        latent, rope_key = torch.randn(2, 1, length, 16), torch.randn(2, 1, length, 4)
        latents, rope_keys = cache.update(latent, rope_key, 0)
    keys = joined(latents, rope_keys)
    assert torch.equal(keys, torch.cat((latents, rope_keys), -1).squeeze(1)) and keys.shape == (2, 6, 20)
    assert keys.untyped_storage().data_ptr() == latents.untyped_storage().data_ptr()
    apart = joined(latents.clone(), rope_keys.clone())
    assert torch.equal(apart, keys)


def test_joined_keeps_gradients():
    both = torch.randn(1, 1, 3, 6, requires_grad=True)
    joined(*both.split((4, 2), -1)).sum().backward()
    assert both.grad is not None and torch.equal(both.grad, torch.ones_like(both))


@pytest.mark.parametrize("length", [3, 2**15])
def test_product_by_row(length: int):
    """Short and long, with room between the rows of the batch."""
    keys = torch.randn(2, length + 1, 4)[:, :length]
    weights = torch.rand(2, 5, length)
    torch.testing.assert_close(by_row(weights, keys), torch.bmm(weights, keys.contiguous()), rtol=1e-4, atol=1e-3)
