"""Scores of tokens as TRL's trainers ask for them, from our own head (`kernels.token_scores`).

TRL replaces the model's forward with one that multiplies with `lm_head.weight`: past any adapter on it, and, where
there is no Triton, for every token instead of those with a label, in float32. Here the head itself is called, for
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
    """What TRL's trainers read: [B, T - 1] of each token from the second on, 0 where it has no label."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


@dataclass(frozen=True)
class HeadSettings:
    """Logits are divided by temperature. float32: TRL's cast_lm_head_to_fp32, which has cast the head. uniform: see
    `Head`."""

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
    """Gives a causal language model, adapted or not, a `forward(fused_lm_head=True)` in place of the one of TRL's
    `add_fused_lm_head`."""
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    others = base.forward

    @wraps(type(base).forward)  # `generate` looks at the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return _score(self, settings, *args, **kwargs) if fused_lm_head else others(*args, **kwargs)

    base.forward = MethodType(forward, base)


@contextmanager
def with_fused_head(model: Any, settings: HeadSettings) -> Iterator[None]:
    """Around the making of a TRL trainer: `fuse_head` once it is made. While TRL looks, it sees an adapted head without
    its adapters, which it would refuse."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        model.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        model.__dict__.pop("get_output_embeddings", None)
    fuse_head(model, settings)
