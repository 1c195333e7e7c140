"""Low-precision products in float32: what low-precision kernels give, and closer to the exact values."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_v2_modeling import LatentCache, lora_config
from deepseek_v2_modeling.cache import joined, with_room
from deepseek_v2_modeling.cache_codecs import BLOCK
from deepseek_v2_modeling.kernels import block_attention
from deepseek_v2_modeling.kernels import float32_attention as wide_attention
from deepseek_v2_modeling.kernels import float32_products as products
from deepseek_v2_modeling.kernels.float32_products import Linear, float32_is_faster, widens
from deepseek_v2_modeling.kernels.swiglu import gated
from deepseek_v2_modeling.layers import attention
from deepseek_v2_modeling.layers.norm import DeepseekV2RMSNorm

from ..helpers.models import logits_of, random_adapter, random_ids, relative, small_model

BF16_ROUNDING = 2**-8


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """cpu(fast) makes this machine's CPU one with fast or slow low-precision products; two rows count as large."""

    def choose(fast: bool) -> None:
        seconds = {torch.float32: 2.0}
        monkeypatch.setattr(products, "product_seconds", lambda dtype: seconds.get(dtype, 1.0 if fast else 4.0))
        float32_is_faster.cache_clear()

    monkeypatch.setattr(products, "ROWS", 2)
    monkeypatch.setattr(products, "PIECE", 40)
    monkeypatch.setattr(products, "TOKENS", 3)
    yield choose
    monkeypatch.undo()
    float32_is_faster.cache_clear()


def test_the_rate_of_each_dtype_is_measured_once(monkeypatch: pytest.MonkeyPatch):
    """In that dtype also under autocast, and in training."""
    measured = []

    def record(a: torch.Tensor, b: torch.Tensor, product: Any = torch.mm) -> torch.Tensor:
        out = product(a, b)
        measured.append(out.dtype)
        return out

    monkeypatch.setattr(torch, "mm", record)
    float32_is_faster.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        for _ in range(2):
            float32_is_faster(torch.float16)
            float32_is_faster(torch.bfloat16)
    each = [torch.float32] * (1 + products.REPEATS)
    assert measured == [*each, *[torch.float16] * len(each), *each, *[torch.bfloat16] * len(each)]
    assert 0 < products.product_seconds(torch.float32) < 1
    float32_is_faster.cache_clear()


def test_where_products_are_wide(cpu: Any):
    x = torch.zeros(1, dtype=torch.bfloat16)
    cpu(True)
    assert not widens(x, 2)
    cpu(False)
    assert widens(x, 2) and not widens(x, 1) and not widens(x.float(), 2) and not widens(x.to("meta"), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert widens(x.float(), 2)


@pytest.mark.parametrize("rows", [5, products.STEADY, 2 * products.STEADY + 3])
@pytest.mark.parametrize("trained", [True, False])
def test_float32_products_of_onednn(rows: int, trained: bool, monkeypatch: pytest.MonkeyPatch):
    """As MKL's, and so are the gradients; not where small, nor for another dtype."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    called: list[tuple[int, ...]] = []
    linear = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_linear_pointwise",
        lambda x, w, *rest: [called.append(tuple(x.shape)), linear(x, w, *rest)][1],
    )
    layer, x = Linear(12, 9, bias=False), torch.randn(1, rows, 12, requires_grad=True)
    layer.weight.requires_grad_(trained)
    layer(x).sum().backward()
    assert not called
    monkeypatch.setattr(products, "WORTH_ONEDNN", 1)
    upstream, inputs = torch.randn(1, rows, 9), [x, layer.weight] if trained else [x]
    wanted = torch.autograd.grad(x @ layer.weight.T, inputs, upstream)
    found = torch.autograd.grad(layer(x), inputs, upstream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    steady = rows - rows % products.STEADY
    assert called == ([(steady, 12), (steady, 9)] if steady else [])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
        layer.bfloat16()(x.bfloat16())
    assert len(called) == (3 if steady else 0)


def test_experts_gradients_by_onednn(monkeypatch: pytest.MonkeyPatch):
    """As MKL's, of frozen experts and of trained ones."""
    monkeypatch.setattr(products, "WORTH_ONEDNN", 1)
    sides = []
    for faster in (False, True):
        monkeypatch.setattr(products, "onednn_is_faster", lambda faster=faster: faster)
        for full in (False, True):
            model = small_model() if full else random_adapter(small_model(), lora_config(targets=("experts",), r=4))
            ids = random_ids(2, 200)
            model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            sides.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(sides[0] + sides[1], sides[2] + sides[3], strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "before"), [(3, 0), (8, 0), (13, 0), (1, 6), (6, 5)])
def test_attention_in_blocks(
    cpu: Any, tokens: int, before: int, dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
):
    """Of queries, and of some heads at a time; values are narrower than keys, and tokens may continue others. Gradients
    too, about as near to the exact ones as those of torch's kernel; where one score stands out, and where a later key,
    which is not attended to, has the highest of all."""
    cpu(fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for name, value in {"QUERIES": 2, "WORTH": {dtype.itemsize: 28}, "IN_CACHE": 120}.items():
        monkeypatch.setattr(block_attention, name, value)
    torch.manual_seed(0)
    query = torch.randn(2, 3, tokens, 8, dtype=dtype)
    key, value = (torch.randn(2, 3, before + tokens, width, dtype=dtype) for width in (8, 6))
    key[:, 0, 0], key[:, 1, -1] = 8 * query[:, 0, -1], 30 * query[:, 1, 0]
    parts = [t.requires_grad_() for t in (query, key, value)]
    mask = torch.ones(tokens, before + tokens, dtype=torch.bool).tril(before)
    exact: Any = [t.detach().double().requires_grad_() for t in parts]
    wanted = F.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3).transpose(1, 2)
    given = mask if before else None
    assert block_attention.in_blocks(query, key, given, before > 0, 0.0) is (tokens > 3)
    assert not block_attention.in_blocks(query, key[:, :, 1:], given, False, 0.0)
    assert not block_attention.in_blocks(query, key, given, before > 0, 0.1)
    found, _ = block_attention.block_attention(nn.Identity(), query, key, value, given, 0.3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(found, block_attention.block_attention(nn.Identity(), query, key, value, given, 0.3)[0])
    near = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, wanted.to(dtype), rtol=near, atol=near)
    torchs = F.scaled_dot_product_attention(query, key, F.pad(value, (0, 2)), attn_mask=mask, scale=0.3)[..., :6]
    upstream = torch.randn_like(found)
    sides: Any = ((found, parts), (torchs.transpose(1, 2), parts), (wanted, exact))
    for one, other, true in zip(
        *(torch.autograd.grad(out, of, upstream.to(out.dtype)) for out, of in sides), strict=True
    ):
        assert one.dtype == dtype and relative(one, true) < 4 * relative(other, true) + 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear(cpu: Any, bias: bool, dtype: torch.dtype):
    """Every result is the exact one rounded once; so are the gradients, of which none is missing."""
    cpu(False)
    torch.manual_seed(0)
    layer = Linear(12, 9, bias=bias, dtype=dtype)
    x = torch.randn(2, 4, 12, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 4, 9, dtype=dtype)
    y = layer(x)
    exact = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    wanted = F.linear(*exact)
    assert y.dtype == dtype
    torch.testing.assert_close(y, wanted.to(dtype), rtol=2**-7, atol=1e-3)
    found = torch.autograd.grad(y, (x, *layer.parameters()), upstream)
    for one, other in zip(found, torch.autograd.grad(wanted, exact, upstream.double()), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other.to(dtype), rtol=2**-7, atol=1e-3)


def test_linear_of_frozen_weights_and_under_autocast(cpu: Any):
    cpu(False)
    layer = Linear(6, 5, bias=False).requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and layer.weight.grad is None


def losses_and_gradients(amx: bool, cpu: Any, dtype: torch.dtype, mask: Any) -> list[torch.Tensor]:
    cpu(amx)
    model = random_adapter(small_model(dtype=dtype), lora_config(targets=("attention", "experts"), r=4, alpha=8)).to(
        dtype
    )
    model.train()
    ids = random_ids(2, 24)
    loss = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.float() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("padded", [False, True])
def test_training_is_as_good_as_in_low_precision(cpu: Any, padded: bool):
    """Loss and gradients of a bf16 model with adapters: not further from float32 than with bf16 products."""
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = int(not padded)
    exact = losses_and_gradients(True, cpu, torch.float32, mask)
    low = losses_and_gradients(True, cpu, torch.bfloat16, mask)
    wide = losses_and_gradients(False, cpu, torch.bfloat16, mask)
    distances = [sum(relative(one, other) for one, other in zip(side, exact, strict=True)) for side in (low, wide)]
    assert not all(torch.equal(one, other) for one, other in zip(low, wide, strict=True))
    assert distances[1] < 1.05 * distances[0]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.bfloat16])
def test_attention(monkeypatch: pytest.MonkeyPatch, grad: bool, masked: torch.dtype | None):
    """As SDPA in float64, in the shape that transformers' kernels give; some heads at a time without gradients."""
    monkeypatch.setattr(wide_attention, "PIECE", 100)
    torch.manual_seed(0)
    parts = [torch.randn(2, 4, 5, 8, dtype=torch.bfloat16, requires_grad=grad) for _ in range(3)]
    exact = [t.detach().double().requires_grad_(grad) for t in parts]
    allowed = (torch.rand(2, 1, 5, 5) > 0.3) | torch.eye(5, dtype=torch.bool) if masked else None
    added = None if allowed is None else torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill(~allowed, -1e9)
    mask = added if masked == torch.bfloat16 else allowed
    wanted = F.scaled_dot_product_attention(*exact, attn_mask=allowed, is_causal=not masked, scale=0.3).transpose(1, 2)
    with torch.set_grad_enabled(grad):
        found, weights = wide_attention.wide_attention(nn.Identity(), *parts, mask, 0.3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(found, wide_attention.wide_attention(nn.Identity(), *parts, mask, 0.3)[0])
    assert weights is None and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted.bfloat16(), rtol=2**-7, atol=1e-3)
    if grad:
        upstream = torch.randn_like(found)
        for one, other in zip(
            torch.autograd.grad(found, parts, upstream),
            torch.autograd.grad(wanted, exact, upstream.double()),
            strict=True,
        ):
            torch.testing.assert_close(one, other.bfloat16(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("limit", [1, 10_000])
def test_decoding_in_low_precision(cpu: Any, amx: bool, adapted: bool, limit: int, monkeypatch: pytest.MonkeyPatch):
    """Token by token with a cache as in one forward, over the edge of a block of the cache; short rows and long ones.
    Without routed experts: rounding flips some."""
    cpu(amx)
    monkeypatch.setattr(attention, "WORTH_A_PRODUCT", limit)
    model = small_model(first_k_dense_replace=3)
    if adapted:
        model = random_adapter(model, lora_config(targets=("attention",), r=4, alpha=8))
    model.to(torch.bfloat16)
    ids = random_ids(2, BLOCK + 4)
    cache = LatentCache(model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :-8], past_key_values=cache)
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(BLOCK - 4, BLOCK + 4)]
    assert relative(torch.cat(steps, 1).float(), logits_of(model, ids)[:, -8:].float()) < 4 * BF16_ROUNDING


def test_keys_with_room():
    """Up to a whole block of tokens, and never beyond the buffer or of other keys."""
    model = small_model()
    cache = LatentCache(model.config)
    latent, rope_key = torch.randn(2, 1, 5, 16), torch.randn(2, 1, 5, 4)
    cache.update(latent, rope_key, 0)
    keys = joined(*cache.update(latent[:, :, :1], rope_key[:, :, :1], 0))
    more = with_room(keys)
    assert more.shape == (2, BLOCK, 20)
    assert torch.equal(more[:, :6], keys) and not more[:, 6:].any()
    for other in (keys.clone(), keys[:1].clone(), keys.transpose(0, 1), keys[..., :7]):
        assert with_room(other).shape == other.shape


@pytest.mark.parametrize("shape", [(3,), (2, 5)])
def test_what_is_made_again_for_gradients(shape: tuple[int, ...]):
    torch.manual_seed(0)
    gate, up = (torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(gated(gate, up, nn.SiLU()), F.silu(gate) * up)
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, nn.SiLU()), (gate, up))


def test_norm():
    """The forward and the gradients of the formula, written out."""
    torch.manual_seed(0)
    norm = DeepseekV2RMSNorm(6, 1e-6)
    norm.weight.data.normal_()
    x = torch.randn(2, 3, 6, requires_grad=True)
    wanted = norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    found = norm(x)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(x)
    sides = (torch.autograd.grad(y, (x, norm.weight), upstream, retain_graph=True) for y in (found, wanted))
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other)
