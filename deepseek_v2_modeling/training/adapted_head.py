"""Scores of tokens through a language-model head that carries adapters, as TRL's trainers ask for them.

TRL's own head multiplies with `lm_head.weight`, past any adapter, and so its trainers refuse an adapter there. Here
the head itself is called, a block of tokens at a time; the logits of a block are made again in the backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import ModelOutput

from ..kernels.blockwise_loss import IGNORED, block_rows


@dataclass
class ScoredTokens(ModelOutput):
    """What TRL's trainers read: [B, T - 1] of each token from the second on, 0 where it has no label."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def score_labels(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [n, V], labels [n] -> log-probability of each label and entropy, both [n] float32."""
    logps = (logits.float() / temperature).log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, labels[:, None]).squeeze(-1), entropy


def _score_block(head: nn.Module, x_ND: torch.Tensor, labels_N: torch.Tensor, temperature: float) -> Any:
    logits = head(x_ND)
    return *score_labels(logits, labels_N, temperature), logits.argmax(-1) == labels_N


def score_tokens(
    head: nn.Module, hidden_ND: torch.Tensor, labels_N: torch.Tensor, vocab_size: int, temperature: float
) -> list[torch.Tensor]:
    """[log-probabilities, entropies, whether the label was the likeliest token], each [N]."""
    block = block_rows(hidden_ND, vocab_size)
    starts = range(0, max(1, len(labels_N)), block)  # one even without a label: the loss keeps its gradient
    pieces = [(hidden_ND[start : start + block], labels_N[start : start + block]) for start in starts]
    parts: list[Any] = [checkpoint(_score_block, head, *piece, temperature, use_reentrant=False) for piece in pieces]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _score(
    model: Any,
    temperature: float,
    *args: Any,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> ScoredTokens:
    hidden = model.model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
    if shift_labels is None:
        assert labels is not None
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    mask = shift_labels != IGNORED
    scored = score_tokens(model.lm_head, hidden[mask], shift_labels[mask], model.vocab_size, temperature)
    log_probs, entropy, is_top1 = (value.new_zeros(mask.shape).masked_scatter(mask, value) for value in scored)
    items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return ScoredTokens(-log_probs.sum() / items, log_probs, entropy, is_top1, mask)


@contextmanager
def trains_adapted_head(model: Any, temperature: float = 1.0) -> Iterator[None]:
    """Around the making of a TRL trainer: where the model's head is adapted, `forward(fused_lm_head=True)` is ours.

    While TRL looks, it sees the head without its adapters. Any other model is left as it is.
    """
    head: Any = model.get_output_embeddings() if hasattr(model, "peft_config") else None
    if not isinstance(head, BaseTunerLayer):
        yield
        return
    model.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        del model.get_output_embeddings
    base: Any = model.get_base_model()
    others = base.forward

    @wraps(type(base).forward)  # `generate` looks at the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return _score(self, temperature, *args, **kwargs) if fused_lm_head else others(*args, **kwargs)

    base.forward = MethodType(forward, base)
