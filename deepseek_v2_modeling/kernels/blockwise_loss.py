"""Cross-entropy of the next token without the full logits matrix.

Logits are made, used and dropped a block of tokens at a time; the gradients of the hidden states and of the head are
made in the same pass, so nothing is computed twice.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .float32_products import ROWS

IGNORED = -100  # transformers' label of tokens without a loss
BLOCK_LOGITS = 2**25  # logits of one block: 128 MiB in float32
CACHED_LOGITS = 2**22  # on a CPU: 16 MiB, which its cache holds


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """[B, T]: each token's next one, IGNORED at the end of a row."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def block_rows(hidden: torch.Tensor, vocab_size: int) -> int:
    """How many tokens' logits are made at once."""
    return max(ROWS, (CACHED_LOGITS if hidden.device.type == "cpu" else BLOCK_LOGITS) // vocab_size)


class _BlockwiseLoss(torch.autograd.Function):
    """Sum of the cross-entropies of head(hidden) [N, V]; gradients come with the forward."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, block: int, hidden_ND: torch.Tensor, labels_N: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        grads = [torch.zeros_like(weights[index], dtype=torch.float32) for index in wanted]
        d_hidden, total = torch.empty_like(hidden_ND), hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden_ND.shape[0], block):
            rows = slice(start, start + block)
            with torch.enable_grad():
                x = hidden_ND[rows].detach().requires_grad_()
                loss = F.cross_entropy(head(x).float(), labels_N[rows], ignore_index=IGNORED, reduction="sum")
            dx, *dw = torch.autograd.grad(loss, [x, *(weights[index] for index in wanted)])
            d_hidden[rows] = dx
            total += loss.detach()
            for sum_, grad in zip(grads, dw, strict=True):
                sum_ += grad
        ctx.save_for_backward(d_hidden, *grads)
        ctx.dtypes, ctx.wanted = [weight.dtype for weight in weights], wanted
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        d_hidden, *d_weights = ctx.saved_tensors
        out: list[torch.Tensor | None] = [None] * len(ctx.dtypes)
        for index, grad in zip(ctx.wanted, d_weights, strict=True):
            out[index] = (grad * grads[0]).to(ctx.dtypes[index])
        return None, None, d_hidden * grads[0].to(d_hidden.dtype), None, *out


def blockwise_loss(
    head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """What transformers' ForCausalLMLoss gives for head(hidden [B, T, D]): float32, the mean over the labels, or their
    sum over `num_items_in_batch`. `head` may carry adapters."""
    targets = (shifted_labels(labels) if shift_labels is None else shift_labels).reshape(-1).to(hidden.device)
    weights = [p for p in head.parameters() if p.requires_grad]
    total = _BlockwiseLoss.apply(head, block_rows(hidden, vocab_size), hidden.flatten(0, 1), targets, *weights)
    items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (items.to(hidden.device) if isinstance(items, torch.Tensor) else items)
