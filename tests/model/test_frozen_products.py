"""No frozen weight is copied once a row: what torch does when a slice, a transposed or an expanded view of three
dimensions is multiplied with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_v2_modeling import DeepseekV2ForSequenceClassification, DeepseekV2Model, lora_config
from deepseek_v2_modeling.kernels.token_scores import Head, score_tokens

from ..helpers.models import random_adapter, random_ids, small_model

TARGETS = ("attention", "experts", "shared_experts", "dense", "router", "lm_head")


class Repeats(TorchDispatchMode):
    """Notes each operation that takes a view of a frozen matrix and gives more values than the matrix has."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.frozen = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.ndim > 1}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and func._schema.name in ("aten::expand", "aten::clone", "aten::repeat"):
            name = self.frozen.get(args[0].untyped_storage().data_ptr())
            if name and out.numel() > args[0].numel():
                self.found.append(f"{func} of {name}: {tuple(out.shape)}")
        return out


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> Iterator[None]:
    """Fails where a product with a frozen weight repeats it, or gets a view that is not contiguous."""
    linear, scattered = F.linear, []

    def strict(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if not x.is_contiguous():
            scattered.append((tuple(x.shape), x.stride(), tuple(weight.shape)))
        return linear(x, weight, bias)

    with monkeypatch.context() as patch, Repeats(model) as repeats:
        patch.setattr(F, "linear", strict)
        yield
    assert not repeats.found
    assert not scattered


def frozen(model: Any, adapted: bool) -> Any:
    model = random_adapter(model, lora_config(targets=TARGETS, r=2, alpha=4)) if adapted else model
    return model.eval().requires_grad_(False)


def test_that_it_notices(monkeypatch: pytest.MonkeyPatch):
    layer = nn.Linear(4, 6, bias=False).requires_grad_(False)
    x = torch.randn(3, 5, 4)
    with pytest.raises(AssertionError, match="of weight: \\(3, 4, 6\\)"), watched(monkeypatch, layer):
        layer(x[:, -1:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 12, "attention_bias": True}])
@pytest.mark.parametrize("adapted", [False, True])
def test_prefill_and_decoding(monkeypatch: pytest.MonkeyPatch, adapted: bool, changes: Any, implementation: str):
    model = frozen(small_model(attn_implementation=implementation, **changes), adapted)
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad(), watched(monkeypatch, model):
        for keep in (1, 3, torch.tensor([2, 5])):
            model(input_ids=ids, attention_mask=mask, logits_to_keep=keep)
        model(input_ids=ids[:, :1], logits_to_keep=1)
        model(input_ids=ids, labels=ids)
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2)


@pytest.mark.parametrize("kind", ["absorbed", "expanded"])
def test_decoding_on_a_cache_with_room(monkeypatch: pytest.MonkeyPatch, kind: str):
    """The latents of a cache with room are a slice: kv_b_proj of a DoRA adapter reads them so."""
    model = small_model()
    if kind == "expanded":
        model = random_adapter(model, LoraConfig(r=2, target_modules=["kv_b_proj", "o_proj"], use_dora=True))
    model = frozen(model, adapted=False)
    ids = random_ids(3, 9)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        with watched(monkeypatch, model):
            for place in range(5, 9):
                model(input_ids=ids[:, place : place + 1], past_key_values=cache)


@pytest.mark.parametrize("view", ["slice", "transposed", "expanded"])
@pytest.mark.parametrize("adapted", [False, True])
def test_inputs_embeds_of_any_layout(monkeypatch: pytest.MonkeyPatch, view: str, adapted: bool):
    model = frozen(small_model(), adapted)
    wide = torch.randn(8, 8, 32)
    given = {"slice": wide[:3, 2:6], "transposed": wide.transpose(0, 1)[:3], "expanded": wide[:1].expand(3, -1, -1)}[
        view
    ]
    with torch.no_grad():
        with watched(monkeypatch, model):
            found = model(inputs_embeds=given).logits
        torch.testing.assert_close(found, model(inputs_embeds=given.contiguous()).logits)


@pytest.mark.parametrize("cls", [DeepseekV2ForSequenceClassification, DeepseekV2Model])
def test_scoring_and_the_backbone(monkeypatch: pytest.MonkeyPatch, cls: Any):
    model = frozen(small_model(cls), adapted=False)
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad(), watched(monkeypatch, model):
        model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids, position_ids=torch.arange(12).remainder(4).expand(3, -1))


def test_training_with_a_frozen_base(monkeypatch: pytest.MonkeyPatch):
    model = random_adapter(small_model(), lora_config(targets=TARGETS, r=2, alpha=4))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ids = random_ids(3, 12)
    with watched(monkeypatch, model):
        loss = model.train()(input_ids=ids, labels=ids).loss
        base, labels = model.base_model.model, ids[:, 1:].reshape(-1)
        hidden = base.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        (loss + score_tokens(Head(base.lm_head, 61), hidden, labels).logps.sum()).backward()


def test_a_head_of_another_class(monkeypatch: pytest.MonkeyPatch):
    """transformers makes a plain nn.Linear when the vocabulary is resized."""
    model = small_model()
    model.resize_token_embeddings(64)
    model = frozen(model, adapted=False)
    with torch.no_grad(), watched(monkeypatch, model):
        model(input_ids=random_ids(3, 6), logits_to_keep=1)
