"""What the floors above use a model for: answers to prompts, reward scores and token losses.

B batch, T tokens.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F

from .answer_records import AnswerRecord, record_answers
from .batching import by_length, evaluation_mode, finite, pad_batch, unpad_batch
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

    Sequences with a common prefix, such as answers to one prompt, are computed with one prefix (sdpa attention only).

    Raises:
        ModelError: a score is NaN or infinite.
    """
    scores: list[list[float]] = [[] for _ in sequences]
    implementation = getattr(model.config, "_attn_implementation", None) or "eager"
    shares = implementation == "sdpa"  # flash kernels cannot continue documents, and others would need a mask over all
    groups, rest = shared_prefixes(sequences) if shares else ([], list(range(len(sequences))))

    with evaluation_mode(model):
        for batch in _group_batches(groups, batch_size):
            for i, row in zip(*_group_scores(model, sequences, batch), strict=True):
                scores[i] = row
        for places in by_length([sequences[i] for i in rest], batch_size):
            batch = [rest[place] for place in places]
            rows = pad_batch([sequences[i] for i in batch], pad_token_id, left=False)
            for i, row in zip(batch, _row_scores(model, *rows), strict=True):
                scores[i] = row
    return scores


def _row_scores(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    """[B][heads] of rows [B, T] padded on the right."""
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    finite(model, "scores", logits)
    return logits.float().tolist()


def _group_scores(
    model: nn.Module, sequences: Sequence[Sequence[int]], groups: Sequence[Group]
) -> tuple[list[int], list[list[float]]]:
    """(indices of the members of all groups, [members][heads]): one packed row in which each group's prefix is a
    document, which the rest of each of its sequences continues."""
    documents: list[Sequence[int]] = []
    starts, prefixes = [], []
    for shared, group in groups:
        prefix = len(documents)
        documents += [sequences[group[0]][:shared], *(sequences[i][shared:] for i in group)]
        starts += [0, *[shared] * len(group)]
        prefixes += [-1, *[prefix] * len(group)]
    device = next(model.parameters()).device
    lengths = torch.tensor([len(document) for document in documents])
    positions = [torch.arange(len(document)) + start for document, start in zip(documents, starts, strict=True)]
    inputs = {
        "input_ids": torch.tensor([token for document in documents for token in document])[None],
        "position_ids": torch.cat(positions)[None],
        "seq_idx": torch.arange(len(documents)).repeat_interleave(lengths)[None],
        "prefix_documents": torch.tensor(prefixes),
    }
    logits = model(**{name: values.to(device) for name, values in inputs.items()}, use_cache=False).logits
    finite(model, "scores", logits)
    rows = [row for row, prefix in zip(logits.float().tolist(), prefixes, strict=True) if prefix >= 0]
    return [i for _, group in groups for i in group], rows


def _group_batches(groups: Sequence[Group], batch_size: int) -> Iterator[list[Group]]:
    """Groups of together at most batch_size sequences; larger groups in parts."""
    batch: list[Group] = []
    for shared, group in groups:
        for start in range(0, len(group), batch_size):
            part = (shared, group[start : start + batch_size])
            if batch and sum(len(members) for _, members in batch) + len(part[1]) > batch_size:
                yield batch
                batch = []
            batch.append(part)
    if batch:
        yield batch


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
