"""The loss without the full logits: the same numbers and gradients as transformers' loss on full logits."""

from typing import Any

import pytest
import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from deepseek_v2_modeling import apply_lora, lora_config
from deepseek_v2_modeling.kernels import token_scores as loss

from ..helpers.models import random_ids, small_model

TOKENS, WIDTH, VOCABULARY = 14, 6, 11


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens a block, two of them at once: several blocks and rests."""
    monkeypatch.setattr(loss, "BLOCK_LOGITS", 3 * VOCABULARY)
    monkeypatch.setattr(loss, "CACHED_LOGITS", 2 * VOCABULARY)


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


@pytest.mark.parametrize("head_trains", [True, False])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("entropy_counts", [True, False])
def test_scores_of_tokens(head_trains: bool, uniform: bool, entropy_counts: bool):
    """Tokens without a label among them; weighed each in its own way, unless they promise to be uniform."""
    head, hidden, labels = problem()
    head.requires_grad_(head_trains)
    labels_N, hidden_ND = labels.flatten(), hidden.flatten(0, 1)
    weights = torch.ones(TOKENS) if uniform else torch.randn(TOKENS)
    asked = loss.Head(head, VOCABULARY, temperature=0.7, uniform=uniform)
    found = loss.score_tokens(asked, hidden_ND, labels_N)
    wanted = loss.score_logits(head(hidden_ND), labels_N, 0.7)
    assert torch.equal(found.is_top1, wanted.is_top1) and not found.logps[labels_N == loss.IGNORED].any()
    inputs = [hidden, *(p for p in head.parameters() if head_trains)]
    gradients = []
    for scores in (found, wanted):
        torch.testing.assert_close(scores.entropy, wanted.entropy)
        value = (scores.logps * weights).sum() + (scores.entropy * weights).sum() * entropy_counts
        gradients.append(torch.autograd.grad(value, inputs))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_label_at_all_keeps_the_gradient():
    head, hidden, labels = problem()
    loss.blockwise_loss(head, hidden, torch.full_like(labels, loss.IGNORED), VOCABULARY, 1).backward()
    for tensor in (hidden, *head.parameters()):
        assert tensor.grad is not None and not tensor.grad.any()


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
    assert sum(seen) == ids.numel() - len(ids) and max(seen) < ids.numel()
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
