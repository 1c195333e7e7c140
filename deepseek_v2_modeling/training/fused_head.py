"""Token log-probabilities in the form that TRL's trainers expect, computed with our own head (`kernels.token_scores`).

TRL replaces the model's forward with one that multiplies by `lm_head.weight`. That ignores adapters on the head and,
without Triton, computes all tokens rather than only those with a label, in float32. Here the head itself is called, for
tokens with a label only.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.utils.generic import ModelOutput

from ..kernels.token_scores import IGNORED, Head, score_tokens


@dataclass
class ScoredTokens(ModelOutput):
    """The output that TRL's trainers expect: [B, T - 1] for each token except the first, 0 if it has no label."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


@dataclass(frozen=True)
class HeadSettings:
    """temperature: logits are divided by it. float32: whether TRL's cast_lm_head_to_fp32 has converted the head.
    uniform: see `Head`."""

    temperature: float = 1.0
    float32: bool = False
    uniform: bool = False


def _score(
    model: Any,
    settings: HeadSettings,
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
    head = Head(model.lm_head, model.vocab_size, settings.temperature, settings.uniform)
    with torch.autocast(hidden.device.type, enabled=False) if settings.float32 else nullcontext():
        hidden_ND = hidden[mask].float() if settings.float32 else hidden[mask]
        scored = score_tokens(head, hidden_ND, shift_labels[mask])
    log_probs, entropy, is_top1 = (value.new_zeros(mask.shape).masked_scatter(mask, value) for value in scored)
    items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return ScoredTokens(-log_probs.sum() / items, log_probs, entropy, is_top1, mask)


def fuse_head(model: Any, settings: HeadSettings) -> None:
    """Give a causal language model, with or without adapters, a `forward(fused_lm_head=True)` that replaces the one of
    TRL's `add_fused_lm_head`."""
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    original_forward = base.forward

    @wraps(type(base).forward)  # `generate` inspects the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return _score(self, settings, *args, **kwargs) if fused_lm_head else original_forward(*args, **kwargs)

    base.forward = MethodType(forward, base)


@contextmanager
def with_fused_head(model: Any, settings: HeadSettings) -> Iterator[None]:
    """Context manager for creating a TRL trainer, which calls `fuse_head` at the end. Meanwhile an adapted head is
    hidden from TRL, which would reject it."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        model.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        model.__dict__.pop("get_output_embeddings", None)
    fuse_head(model, settings)
