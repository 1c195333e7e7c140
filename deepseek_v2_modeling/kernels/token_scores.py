"""Log-probabilities of labels under head(hidden) without the full logits: for cross-entropy and policy gradients.

Logits are computed, used and freed one block of tokens at a time. The gradient of a log-probability depends only on its
own token's logits, so it is computed along with them, and the backward pass only scales it; nothing is computed twice.
The backward pass recomputes the logits where that is not enough: if the head is trained and tokens have different
weights, or if the entropy is part of the loss.

N tokens with a label, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .float32_products import Linear, compute_dtype, is_plain, widens
from .row_blocks import row_blocks

IGNORED = -100  # the label that transformers excludes from the loss
BLOCK_LOGITS = 2**26  # logits per product with the head: 128 MiB in bf16
CACHED_LOGITS = 2**20  # logits per softmax on a CPU: 4 MiB in float32, which fits into its cache


class TokenScores(NamedTuple):
    """[N] each: the label's log-probability in nats (float32; 0 if it is IGNORED), the distribution's entropy in nats
    (float32), and whether the label is the most likely token."""

    logps: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """[B, T]: the label of the next position at each position, IGNORED at the end of a row."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def score_logits(logits_NV: torch.Tensor, labels_N: torch.Tensor, temperature: float) -> TokenScores:
    """`TokenScores` of logits [N, V] / temperature, in plain tensor operations under autograd."""
    all_logps = (logits_NV.float() / temperature).log_softmax(-1)
    logps = all_logps.gather(-1, labels_N.clamp(min=0).unsqueeze(1)).squeeze(1)
    entropy = -(all_logps.exp() * all_logps).sum(-1)
    return TokenScores(logps * (labels_N != IGNORED), entropy, logits_NV.argmax(-1) == labels_N)


class Gradients(NamedTuple):
    """The gradients of the hidden states, in their dtype, and of the head's weights, in float32."""

    hidden_ND: torch.Tensor
    weights: list[torch.Tensor]

    @classmethod
    def zeros(cls, hidden_ND: torch.Tensor, weights: Sequence[torch.Tensor]) -> "Gradients":
        return Gradients(torch.zeros_like(hidden_ND), [torch.zeros_like(w, dtype=torch.float32) for w in weights])

    def add(self, rows: slice, parts: Sequence[torch.Tensor]) -> None:
        """Store the rows' hidden gradient parts[0] and accumulate the weights' gradients parts[1:]."""
        self.hidden_ND[rows], *of_weights = parts
        for total, part in zip(self.weights, of_weights, strict=True):
            total += part


def autocast_as_now(x: torch.Tensor) -> AbstractContextManager[Any]:
    """A context with the current autocast settings, for use in a backward pass, which runs outside of them."""
    kind = x.device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


class Head(NamedTuple):
    """The language-model head: maps hidden states [n, D] to logits [n, V] / temperature.

    uniform: the caller guarantees that the log-probabilities are summed, so all have the same gradient, and the
    gradients of the head's weights can also be computed with the logits. figures: whether entropy and is_top1 are
    needed as well as the log-probabilities.
    """

    module: nn.Module
    vocab_size: int
    temperature: float = 1.0
    uniform: bool = False
    figures: bool = True

    def blocks(self, rows: int) -> Iterator[slice]:
        return row_blocks(rows, self.vocab_size, BLOCK_LOGITS)

    def plain_weight(self, hidden_ND: torch.Tensor) -> torch.Tensor | None:
        """The head's frozen weight [V, D] if logits are hidden times it and nothing else, in its dtype, on a CPU."""
        if type(self.module) is not Linear or hidden_ND.device.type != "cpu" or self.module.bias is not None:
            return None
        weight, dtype = self.module.weight, compute_dtype(hidden_ND)
        hooked = self.module._forward_hooks or self.module._forward_pre_hooks or hasattr(self.module, "_hf_hook")
        if hooked or weight.requires_grad or not is_plain(weight) or not dtype == weight.dtype == hidden_ND.dtype:
            return None
        return None if widens(hidden_ND, len(hidden_ND)) else weight


def _score_in_place(head: Head, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> TokenScores:
    """Like `score_logits`, overwriting the logits with the gradient of each row's log-probability with respect to
    them."""
    parts = []
    values = CACHED_LOGITS if logits_NV.device.type == "cpu" else logits_NV.numel()
    for rows in row_blocks(len(logits_NV), logits_NV.shape[1], values):
        labels = labels_N[rows].unsqueeze(1)
        labelled, targets = labels != IGNORED, labels.clamp(min=0)
        logits = logits_NV[rows].float()
        logps = (logits if head.temperature == 1 else logits.div_(head.temperature)).log_softmax(-1)
        label_logps = logps.gather(-1, targets)
        is_top1 = (label_logps == logps.amax(-1, keepdim=True)) & labelled if head.figures else labelled
        probabilities = logps.exp() if head.figures else logps.exp_()
        entropy = -torch.linalg.vecdot(probabilities, logps) if head.figures else label_logps.squeeze(1)
        negative = probabilities.scatter_add_(-1, targets, torch.full_like(label_logps, -1.0))
        logits_NV[rows] = negative.mul_(labelled / -head.temperature)
        parts.append(((label_logps * labelled).squeeze(1), entropy, is_top1.squeeze(1)))
    logps, entropy, is_top1 = map(torch.cat, zip(*parts, strict=True))
    return TokenScores(logps, entropy, is_top1)


def _scores_of_plain_head(
    head: Head, weight_VD: torch.Tensor, hidden_ND: torch.Tensor, labels_N: torch.Tensor, d_hidden: torch.Tensor | None
) -> list[TokenScores]:
    """The scores of each block; the gradients of their log-probabilities are written into d_hidden [N, D], if given.

    All blocks share one buffer of logits: the page faults of a new one of 100 MB cost as much as a pass over it.
    """
    blocks, scores = list(head.blocks(len(hidden_ND))), []
    buffer = hidden_ND.new_empty(max((block.stop - block.start for block in blocks), default=0), len(weight_VD))
    for rows in blocks:
        logits = torch.mm(hidden_ND[rows], weight_VD.t(), out=buffer[: rows.stop - rows.start])
        scores.append(_score_in_place(head, logits, labels_N[rows]))
        if d_hidden is not None:
            torch.mm(logits, weight_VD, out=d_hidden[rows])
    return scores


class _Scores(torch.autograd.Function):
    """The `TokenScores` of labels. weights: the head's trainable parameters."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, hidden_ND: torch.Tensor, labels_N: torch.Tensor, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ready = any(ctx.needs_input_grad) and (head.uniform or not weights)
        gradients = Gradients.zeros(hidden_ND, weights) if ready else None
        empty = hidden_ND.new_zeros(0, dtype=torch.float32)
        scores = [TokenScores(empty, empty, empty.bool())]
        plain = None if weights else head.plain_weight(hidden_ND)
        if plain is not None:
            d_hidden = None if gradients is None else gradients.hidden_ND
            scores += _scores_of_plain_head(head, plain, hidden_ND, labels_N, d_hidden)
        for rows in head.blocks(len(hidden_ND)) if plain is None else ():
            with torch.set_grad_enabled(ready):
                x = hidden_ND[rows].detach().requires_grad_(ready)
                logits = head.module(x)
            d_logits = logits.detach()
            scores.append(_score_in_place(head, d_logits, labels_N[rows]))
            if gradients is not None:
                gradients.add(rows, torch.autograd.grad(logits, [x, *weights], d_logits))
        ctx.save_for_backward(hidden_ND, labels_N, *weights)
        ctx.head, ctx.gradients, ctx.autocast = head, gradients, autocast_as_now(hidden_ND)
        out = tuple(map(torch.cat, zip(*scores, strict=True)))
        ctx.mark_non_differentiable(out[2])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        hidden_ND, labels_N, *weights = ctx.saved_tensors
        of_logps, of_entropy, _ = grads
        gradients, ctx.gradients = ctx.gradients, None  # the loss holds ctx until the whole backward pass is done
        if of_entropy is None and of_logps is not None and gradients is not None:
            d_hidden, d_weights = gradients
            of_all = of_logps[:1].sum()  # all are equal (`uniform`); 0 if there are no labels
            d_hidden = d_hidden * of_logps.unsqueeze(1).to(d_hidden.dtype)
            d_weights = [of_all * total for total in d_weights]
        else:
            with ctx.autocast:
                d_hidden, d_weights = _recomputed_gradients(
                    ctx.head, hidden_ND, labels_N, weights, (of_logps, of_entropy)
                )
        return None, d_hidden, None, *(d.to(w.dtype) for d, w in zip(d_weights, weights, strict=True))


def _recomputed_gradients(
    head: Head,
    hidden_ND: torch.Tensor,
    labels_N: torch.Tensor,
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
) -> Gradients:
    """The gradients, from recomputed logits. grads: those of the log-probabilities and of the entropies, None if not
    part of the loss."""
    gradients = Gradients.zeros(hidden_ND, weights)
    present = [(place, grad) for place, grad in enumerate(grads) if grad is not None]
    for rows in head.blocks(len(hidden_ND)) if present else ():
        with torch.enable_grad():
            x = hidden_ND[rows].detach().requires_grad_()
            scores = score_logits(head.module(x), labels_N[rows], head.temperature)
        outputs, parts = zip(*((scores[place], grad[rows]) for place, grad in present), strict=True)
        gradients.add(rows, torch.autograd.grad(outputs, [x, *weights], parts))
    return gradients


def score_tokens(head: Head, hidden_ND: torch.Tensor, labels_N: torch.Tensor) -> TokenScores:
    """The `TokenScores` of labels [N] under head(hidden [N, D]), differentiable in hidden and the head's weights."""
    weights = [p for p in head.module.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    if weights and not head.uniform and len(hidden_ND) * head.vocab_size <= BLOCK_LOGITS:
        return score_logits(head.module(hidden_ND), labels_N, head.temperature)  # small enough to keep all logits
    return TokenScores(*_Scores.apply(head, hidden_ND, labels_N, *weights))


def blockwise_loss(
    head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of head(hidden [B, T, D]), equal to transformers' ForCausalLMLoss: a float32 scalar in nats, the
    mean over the labels, or their sum divided by `num_items_in_batch`. `head` may have adapters."""
    targets = (shifted_labels(labels) if shift_labels is None else shift_labels).reshape(-1).to(hidden.device)
    hidden_ND, labelled = hidden.flatten(0, 1), targets != IGNORED
    if hidden.device.type == "cpu":  # on a GPU, indexing by a mask would make the host wait for the count
        hidden_ND, targets = hidden_ND[labelled], targets[labelled]
    logps = score_tokens(Head(head, vocab_size, uniform=True, figures=False), hidden_ND, targets).logps
    items = labelled.sum() if num_items_in_batch is None else num_items_in_batch
    return -logps.sum() / (items.to(hidden.device) if isinstance(items, torch.Tensor) else items)
