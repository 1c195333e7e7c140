"""What the floors above use a model for: answers to prompts, reward scores and token losses.

B batch, T tokens.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F

from .answer_records import AnswerRecord, record_answers
from .batching import by_length, evaluation_mode, finite, in_threads, pad_batch, unpad_batch
from .cache import LatentCache
from .generation import (
    Adjust,
    AfterTurn,
    Finished,
    Stops,
    cache_bytes,
    decoding_dtype,
    end_tokens,
    generate_answers,
)
from .likelihoods import Continuation, Likelihood, continuation_likelihoods
from .sampling import choose_tokens
from .shared_prefixes import Group, shared_prefixes

__all__ = [
    "Adjust",
    "AfterTurn",
    "AnswerRecord",
    "Continuation",
    "Finished",
    "Likelihood",
    "Stops",
    "by_length",
    "cache_bytes",
    "choose_tokens",
    "continuation_likelihoods",
    "decoding_dtype",
    "end_tokens",
    "evaluation_mode",
    "finite",
    "generate_answers",
    "pad_batch",
    "record_answers",
    "score_heads",
    "score_sequences",
    "token_losses",
    "unpad_batch",
]


def score_sequences(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
) -> list[float]:
    """A reward model's score for each sequence of token ids, in order; the mean over its heads.

    Raises:
        ModelError: a score is NaN or infinite.
    """
    return [fmean(scores) for scores in score_heads(model, sequences, pad_token_id=pad_token_id, batch_size=batch_size)]


@torch.no_grad()
def score_heads(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
) -> list[list[float]]:
    """Each head's score for each sequence of token ids, in order: [sequences][heads] (right-padded, evaluation mode).

    Sequences with a common prefix, such as answers to one prompt, share one forward pass over the prefix.

    Raises:
        ModelError: a score is NaN or infinite.
    """
    scores: list[list[float]] = [[] for _ in sequences]
    groups, rest = shared_prefixes(sequences)

    def score(shared: int, batch: list[int]) -> None:
        rows = pad_batch([sequences[i] for i in batch], pad_token_id, left=False)
        for i, row in zip(batch, _scored(model, shared, *rows).float().tolist(), strict=True):
            scores[i] = row

    with evaluation_mode(model):
        in_threads(model, score, _score_batches(sequences, groups, rest, batch_size))
    return scores


def _scored(model: nn.Module, shared: int, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, heads] of rows [B, T] padded on the right, whose first `shared` tokens are the same and are computed once."""
    device, cache = next(model.parameters()).device, None
    ids, mask = ids.to(device), mask.to(device)
    if shared:
        cache = LatentCache(model.config)  # pyright: ignore[reportArgumentType]
        model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
    inputs = {"input_ids": ids[:, shared:], "attention_mask": mask, "past_key_values": cache}
    logits = model(**inputs, use_cache=cache is not None).logits
    finite(model, "scores", logits)
    return logits


def _score_batches(
    sequences: Sequence[Sequence[int]], groups: Sequence[Group], rest: Sequence[int], batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """For each batch: (length of the prefix that is computed once, indices into `sequences`)."""
    for shared, group in groups:
        for batch in by_length([sequences[i] for i in group], batch_size):
            yield shared if len(batch) > 1 else 0, [group[i] for i in batch]
    for batch in by_length([sequences[i] for i in rest], batch_size):
        yield 0, [rest[i] for i in batch]


@torch.no_grad()
def token_losses(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
) -> list[tuple[float, int]]:
    """(summed cross-entropy in nats, number of tokens) of each sequence, over the tokens whose mask is 1, except the
    first token, which nothing predicts.

    Raises:
        ModelError: the logits are NaN or infinite.
    """
    losses = [(0.0, 0)] * len(sequences)
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for batch in by_length(sequences, batch_size):
            ids, real = pad_batch([sequences[i] for i in batch], pad_token_id, left=False)
            loss_mask, _ = pad_batch([masks[i] for i in batch], 0, left=False)
            ids, real, loss_mask = ids.to(device), real.to(device), loss_mask.to(device)[:, 1:]
            logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
            finite(model, "logits", logits)
            nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            sums = zip((nats * loss_mask).sum(1).tolist(), loss_mask.sum(1).tolist(), strict=True)
            for i, row_sums in zip(batch, sums, strict=True):
                losses[i] = row_sums
    return losses
