"""Batches of lists of token ids, by length to minimise padding, and what every forward on them needs.

B batch, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .checkpoints.finite import check_weights, is_finite
from .errors import ModelError


def by_length(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices into `sequences`, longest first (so that running out of memory happens in the first batch),
    with identical sequences next to each other."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), tuple(sequences[i])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_token_id: int, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, T], mask [B, T]), padded on the left or on the right; the mask is 1 on real tokens."""
    longest = max(len(ids) for ids in sequences)
    ids = torch.full((len(sequences), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask


def unpad_batch(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Padded rows [B, T] -> packed {input_ids, position_ids} [1, N]: the rows concatenated, each a document whose
    positions start at 0."""
    real = mask.bool()
    return {"input_ids": ids[real][None], "position_ids": (mask.cumsum(-1) - 1)[real][None]}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager that puts the model in evaluation mode and restores its previous mode on exit."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def finite(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Raise ModelError if a model's outputs are not finite; the message names a non-finite weight if there is one."""
    if not is_finite(values):
        check_weights(model, "the model")
        raise ModelError(
            f"the model's {name} are not finite (NaN or infinity), though its weights are: it overflows in this dtype, "
            "or its numbers are out of range; try dtype float32, or an earlier checkpoint"
        )
