"""Every attention implementation gives the same, whatever the batch looks like; compiled or not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from deepseek_v2_modeling import DeepseekV2ForCausalLM, LatentCache, lora_config
from deepseek_v2_modeling.layers import attention_plan as masks

from ..helpers.models import left_padded, logits_of, random_adapter, random_ids, small_config, small_model
from .test_packing import positions_of

LENGTH = 12
PACKED = [[5, 7], [1, 3, 3, 5]]


def flash_like(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' flash attention takes and gives: documents of one row by their boundaries, or a mask
    [B, S] of real tokens. Like the kernel it refuses a value of another width than the key's."""
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    queries, keys = query.shape[2], key.shape[2]
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        assert attention_mask.ndim == 2 and not attention_mask.all()
        allowed = allowed & attention_mask[:, None, None, :].bool()
        allowed = allowed | torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries).tril(keys - queries)
    if cu_seq_lens_q is not None:
        assert query.shape[0] == 1 and cu_seq_lens_q.dtype == torch.int32 and cu_seq_lens_q[-1] == queries
        assert max_length_q == cu_seq_lens_q.diff().max()
        document = torch.bucketize(torch.arange(queries), cu_seq_lens_q[1:], right=True)
        allowed = allowed & (document[:, None] == document)
    out = F.scaled_dot_product_attention(query, key, value, allowed, scale=scaling)
    return out.transpose(1, 2), None


@pytest.fixture(params=["sdpa", "flex_attention", "flash_attention_2"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """flex without the compiler, which takes 20 s on a CPU; flash as a stand-in with its interface."""
    if request.param == "flash_attention_2":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_like)  # pyright: ignore
    with torch.compiler.set_stance("force_eager"):
        yield request.param


def model_with(implementation: str, **changes: Any) -> DeepseekV2ForCausalLM:
    """Set after the model is made: transformers asks whether flash-attn is installed when it is made."""
    model = small_model(attn_implementation="eager", **changes)
    model.config._attn_implementation = implementation
    return model


def right_padded(ids: torch.Tensor, pads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, ids.shape[1] - count :] = 0
    return torch.where(mask.bool(), ids, 1), mask


def batches() -> dict[str, dict[str, Any]]:
    ids = random_ids(2, LENGTH)
    left, left_mask, left_positions = left_padded(ids, [0, 4])
    right, right_mask = right_padded(ids, [3, 0])
    packed = positions_of(PACKED)
    half, half_mask, _ = left_padded(ids, [0, 2])
    beside = torch.tensor([[*range(LENGTH)], [1, 1, *range(5), *range(5)]])
    return {
        "plain": {"input_ids": ids},
        "a mask of ones": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "left padding": {"input_ids": left, "attention_mask": left_mask, "position_ids": left_positions},
        "right padding": {"input_ids": right, "attention_mask": right_mask},
        "packed": {"input_ids": ids, "position_ids": packed},
        "packed, a mask of ones": {"input_ids": ids, "position_ids": packed, "attention_mask": torch.ones_like(ids)},
        "one packed row": {"input_ids": ids[:1], "position_ids": packed[:1]},
        "packed beside left padding": {"input_ids": half, "attention_mask": half_mask, "position_ids": beside},
        "packed and right padded": {"input_ids": right, "attention_mask": right_mask, "position_ids": packed},
    }


BATCHES = batches()


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_equal_to_eager(implementation: str, name: str, use_cache: bool):
    batch = BATCHES[name]
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for widths in ({}, {"v_head_dim": 16}):  # the value narrower and wider than the key (12)
        if widths and implementation == "flash_attention_2":
            continue  # the kernel has no such value
        inputs = {**batch, "use_cache": use_cache}
        found = logits_of(model_with(implementation, **widths), inputs.pop("input_ids"), **inputs)
        wanted = logits_of(model_with("eager", **widths), batch["input_ids"], **inputs)
        torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["left padding", "right padding", "packed beside left padding"])
def test_padding_changes_nothing(implementation: str, name: str):
    """Each row, or document, equals itself alone; eager is checked through `test_equal_to_eager`."""
    model, batch = model_with(implementation), BATCHES[name]
    found = logits_of(model, batch["input_ids"], **rest_of(batch))
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        parts = [mask.nonzero().squeeze(1)]
        if name.startswith("packed") and row == 1:
            parts = [torch.arange(2, 7), torch.arange(7, 12)]
        for places in parts:
            alone = logits_of(model, ids[places].unsqueeze(0))
            torch.testing.assert_close(found[row, places], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["left padding", "right padding", "a mask of ones"])
def test_long_padded_rows_need_no_mask(name: str, use_cache: bool, monkeypatch: pytest.MonkeyPatch):
    """Memory stays linear; made long here by decree. A cache with more places than tokens is given its mask."""
    batch = BATCHES[name]
    real = batch["attention_mask"].bool()
    wanted = logits_of(model_with("eager"), batch["input_ids"], **rest_of(batch))
    monkeypatch.setattr(masks, "LONG", 2)
    model = model_with("sdpa")
    static = StaticCache(model.config, max_cache_len=2 * LENGTH)
    found = logits_of(model, batch["input_ids"], **rest_of(batch), past_key_values=static)
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-5)
    if not real.all():
        monkeypatch.setattr(masks, "create_causal_mask", None)
    found = logits_of(model, batch["input_ids"], **rest_of(batch), use_cache=use_cache)
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-5)


def rest_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "input_ids"}


@pytest.mark.parametrize("padded", [False, True])
def test_chunks_on_a_cache(implementation: str, padded: bool, monkeypatch: pytest.MonkeyPatch):
    """Long chunks on a cache are expanded; made short here by decree."""
    monkeypatch.setattr(masks, "absorption_pays", lambda config, queries: False)
    model, ids = model_with(implementation), random_ids(2, LENGTH)
    ids, mask, positions = left_padded(ids, [0, 4] if padded else [0, 0])
    full = logits_of(model_with("eager"), ids, attention_mask=mask, position_ids=positions)
    cache, outs = LatentCache(model.config), []
    for begin, end in ((0, 5), (5, 9), (9, 12)):
        seen = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        outs.append(logits_of(model, ids[:, begin:end], past_key_values=cache, **seen))
    real = mask.bool()
    torch.testing.assert_close(torch.cat(outs, dim=1)[real], full[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "left padding", "packed", "packed beside left padding"])
def test_gradients_are_those_of_eager(name: str):
    batch, grads = BATCHES[name], []
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    for kind in ("eager", "sdpa"):
        model = model_with(kind)
        (model(**batch).logits.square() * real.unsqueeze(-1)).sum().backward()
        grads.append({parameter_name: parameter.grad for parameter_name, parameter in model.named_parameters()})
    for parameter_name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][parameter_name], grad, rtol=1e-4, atol=1e-3 * grad.abs().max())


@pytest.mark.skipif(not (is_flash_attn_2_available() and torch.cuda.is_available()), reason="flash-attn is not there")
@pytest.mark.parametrize("name", BATCHES)
def test_flash_on_a_gpu(name: str):
    batch = {key: value.cuda() for key, value in BATCHES[name].items()}
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits = [
        logits_of(small_model(attn_implementation=kind).cuda().to(torch.bfloat16), batch["input_ids"], **rest_of(batch))
        for kind in ("flash_attention_2", "eager")
    ]
    assert (logits[0] - logits[1])[real].norm() < 0.03 * logits[1][real].norm()


# Compiled


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 4, "n_group": 2, "topk_group": 2}


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_forward():
    """One graph, padded and packed: compiled code cannot look at the positions, and is given a mask in any case."""
    model, batch = small_model(**ONE_LAYER), {**BATCHES["packed beside left padding"], "use_cache": False}
    ids, real = batch.pop("input_ids"), batch["attention_mask"].bool()
    found = logits_of(torch.compile(model, fullgraph=True), ids, **batch)
    torch.testing.assert_close(found[real], logits_of(model, ids, **batch)[real], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("adapted", [False, True])
def test_compiled_training(adapted: bool):
    """One graph, with all weights or adapters alone."""
    ids, results = random_ids(2, LENGTH), []
    for compiles in (False, True):
        model = small_model(**ONE_LAYER)
        if adapted:
            model = random_adapter(model, lora_config(targets=("attention", "experts"), r=4, alpha=8))
        model.train()
        run: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-4, atol=1e-6)


def test_settings_of_attention():
    """Chosen when a model is made, or changed later."""
    for kind in ("eager", "sdpa", "flex_attention"):
        assert (
            DeepseekV2ForCausalLM._from_config(small_config(), attn_implementation=kind).config._attn_implementation
            == kind
        )
    model, ids = small_model(attn_implementation="sdpa"), random_ids(1, 6)
    before = logits_of(model, ids)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits_of(model, ids), before, rtol=0, atol=1e-5)
    assert model(ids, output_attentions=True).attentions[0].shape == (1, 4, 6, 6)
