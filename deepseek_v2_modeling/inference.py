"""Batched answers and scores for lists of token ids, grouped by length so that little is padding.

B batch, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig


def by_length(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices into `sequences`, longest first (what does not fit into memory fails at once)."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_token_id: int, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, T], mask [B, T]), padded on the left or on the right."""
    longest = max(len(ids) for ids in sequences)
    ids = torch.full((len(sequences), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, what it was before outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 32,
    seed: int | None = None,
) -> list[list[int]]:
    """An answer for each prompt, in the order of the prompts: token ids, up to and with the end token if one came.

    Temperature 0 is greedy. `seed` makes sampling repeatable without touching the global generator.
    The model's mode (training or evaluation) is as it was afterwards.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        use_cache=True,
    )
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for batch in by_length(prompts, batch_size):
            ids, mask = pad_batch([prompts[i] for i in batch], pad_token_id, left=True)
            ids, mask = ids.to(device), mask.to(device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore
            for i, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = up_to_end(row, eos_token_id)
    return answers


def up_to_end(ids: list[int], eos_token_id: int) -> list[int]:
    """The ids up to and with the first end token; all of them when there is none."""
    return ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids


@torch.no_grad()
def score_sequences(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
) -> list[float]:
    """The reward model's score of each sequence of token ids, in their order (right-padded, evaluation mode)."""
    scores = [0.0] * len(sequences)
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for batch in by_length(sequences, batch_size):
            ids, mask = pad_batch([sequences[i] for i in batch], pad_token_id, left=False)
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            for i, score in zip(batch, logits[:, 0].float().tolist(), strict=True):
                scores[i] = score
    return scores


@torch.no_grad()
def token_losses(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
) -> list[tuple[float, int]]:
    """(summed cross-entropy in nats, tokens) of each sequence, over the tokens whose mask is 1 but for the first."""
    losses = [(0.0, 0)] * len(sequences)
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for batch in by_length(sequences, batch_size):
            ids, real = pad_batch([sequences[i] for i in batch], pad_token_id, left=False)
            trained, _ = pad_batch([masks[i] for i in batch], 0, left=False)
            ids, real, trained = ids.to(device), real.to(device), trained.to(device)[:, 1:]
            logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
            nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            sums = zip((nats * trained).sum(1).tolist(), trained.sum(1).tolist(), strict=True)
            for i, found in zip(batch, sums, strict=True):
                losses[i] = found
    return losses
