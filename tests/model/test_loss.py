"""The loss without the full logits: the same numbers and gradients as transformers' loss on full logits."""

from typing import Any

import pytest
import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from deepseek_v2_modeling import apply_lora, lora_config
from deepseek_v2_modeling.kernels import blockwise_loss as loss

from ..helpers.models import random_ids, small_model

TOKENS, WIDTH, VOCABULARY = 14, 6, 11


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens a block: several blocks and a rest."""
    monkeypatch.setattr(loss, "CACHED_LOGITS", 3 * VOCABULARY)
    monkeypatch.setattr(loss, "ROWS", 1)


def problem() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (2, TOKENS // 2))
    labels[0, :3] = loss.IGNORED
    return nn.Linear(WIDTH, VOCABULARY), torch.randn(2, TOKENS // 2, WIDTH, requires_grad=True), labels


@pytest.mark.parametrize("items", [None, 5, torch.tensor(7)])
@pytest.mark.parametrize("head_trains", [True, False])
def test_values_and_gradients(items: Any, head_trains: bool):
    head, hidden, labels = problem()
    head.requires_grad_(head_trains)
    found = loss.blockwise_loss(head, hidden, labels, VOCABULARY, items)
    wanted = ForCausalLMLoss(head(hidden), labels, VOCABULARY, num_items_in_batch=items)
    torch.testing.assert_close(found, wanted)
    inputs = [hidden, *(p for p in head.parameters() if head_trains)]
    ours, theirs = (torch.autograd.grad(3 * value, inputs) for value in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_labels_that_are_shifted_already():
    head, hidden, labels = problem()
    shifted = loss.shifted_labels(labels)
    assert torch.equal(
        loss.blockwise_loss(head, hidden, labels, VOCABULARY),
        loss.blockwise_loss(head, hidden, torch.zeros_like(labels), VOCABULARY, shift_labels=shifted),
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_no_full_logits_in_training(adapted: bool):
    """The head never sees all tokens at once, adapters on it or not, and all its weights get their gradients."""
    model = small_model(aux_loss_alpha=0.0)
    if adapted:
        model = apply_lora(model, lora_config(["attention", "lm_head"], r=2))
    model.train()
    causal = model.get_base_model() if adapted else model
    seen: list[int] = []
    causal.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].numel() // args[0].shape[-1]))
    ids = random_ids(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    assert sum(seen) == ids.numel() and max(seen) < ids.numel()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ForCausalLMLoss(model(input_ids=ids).logits, ids, causal.vocab_size).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_logits_are_there_when_asked_for():
    """By attribute, by key, as a tuple: with their gradient, as stock's."""
    model = small_model().train()
    ids = random_ids(2, 5)
    wanted = model(input_ids=ids).logits
    asked = (lambda o: o.logits, lambda o: o["logits"], lambda o: o.get("logits"), lambda o: o.to_tuple()[1])
    assert "logits" in model(input_ids=ids, labels=ids)
    for ask in asked:
        logits = ask(model(input_ids=ids, labels=ids))
        torch.testing.assert_close(logits, wanted)
        assert logits.requires_grad
    torch.testing.assert_close(model(input_ids=ids, labels=ids, return_dict=False)[1], wanted)


def test_logits_outlive_accelerates_copy():
    """Mixed precision: accelerate rebuilds the output from its entries."""
    model = small_model().train()
    ids = random_ids(2, 5)
    copied = convert_to_fp32(model(input_ids=ids, labels=ids))
    torch.testing.assert_close(copied.logits, model(input_ids=ids).logits)


def test_the_balance_loss_is_the_last_entry():
    model = small_model().train()
    ids = random_ids(2, 5)
    found = model(input_ids=ids, labels=ids, output_hidden_states=True)
    assert found.logits is not None
    assert list(found.keys()) == ["loss", "logits", "hidden_states", "aux_loss"]
