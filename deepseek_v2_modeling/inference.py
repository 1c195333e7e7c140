"""Batched answers and scores for lists of token ids, grouped by length so that little is padding.

B batch, T tokens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .cache import LatentCache
from .checkpoints.finite import check_weights, is_finite
from .decode_steps import decode_step, logits_of, new_cache
from .errors import ModelError
from .shared_prefixes import Group, shared_prefixes

# (token ids so far [1, T], length of the prompt, logits [1, V]) -> logits [1, V]
Adjust = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's, and those that generation_config.json adds.

    What transformers fills in from config.json, where there is no such file, is the tokenizer's to say.
    """
    config = model.generation_config
    stated = None if config._from_model_config else config.eos_token_id
    listed = [[tokenizer.eos_token_id], stated if isinstance(stated, list) else [stated]]
    return sorted({i for ids in listed for i in ids if i is not None and i < model.config.vocab_size})


def by_length(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices into `sequences`, equal ones side by side, longest first (so that what does not fit into
    memory fails at once)."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), tuple(sequences[i])))
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


def unpad_batch(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """[B, T] with padding -> {input_ids, position_ids} [1, N] without: the rows one after the other, each a document
    that begins at position 0."""
    real = mask.bool()
    return {"input_ids": ids[real][None], "position_ids": (mask.cumsum(-1) - 1)[real][None]}


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
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 32,
    seeds: Sequence[int] | None = None,
    adjust: Adjust | None = None,
) -> list[list[int]]:
    """An answer for each prompt, in the order of the prompts: token ids, up to and with the end token if one came.

    Temperature 0 is greedy. `seeds`, one for each prompt, make sampling repeatable without touching the global
    generator, and an answer independent of what else is in its batch. `adjust` changes a row's logits before a token
    is chosen, the temperature included: (ids so far [1, T], length of the prompt, logits [1, V]) -> logits [1, V].
    `generate` does the same for one batch; here equal prompts are read once, and answers that have ended take
    no further part. The model's mode (training or evaluation) is as it was afterwards.
    """
    ends = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluation_mode(model):
        for batch in by_length(prompts, batch_size):
            drawn = None if seeds is None else draws([seeds[i] for i in batch], max_new_tokens)
            choose = partial(_choose_next, temperature=temperature, draws=drawn, adjust=adjust)
            batch_answers = _answer_batch(
                model, [prompts[i] for i in batch], pad_token_id, ends, max_new_tokens, choose
            )
            for i, answer in zip(batch, batch_answers, strict=True):
                answers[i] = answer
    return answers


def _answer_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    ends: Collection[int],
    max_new_tokens: int,
    choose: Callable[..., torch.Tensor],
) -> list[list[int]]:
    """Answers of one batch. `rows` says whose answer each row of the cache is; rows leave when they have ended."""
    unique = {tuple(prompt): place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in pad_batch(list(unique), pad_token_id, left=True))
    cache = new_cache(model, max_new_tokens - 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    first = logits_of(model, ids, mask, positions, cache)
    finite(model, "logits", first)

    rows = list(range(len(prompts)))
    chosen = torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=device)
    logits, mask = first[chosen], mask[chosen]
    if len(unique) < len(prompts):
        cache.batch_select_indices(chosen)
    step = decode_step(model, cache, mask, max_new_tokens - 1)
    answers: list[list[int]] = [[] for _ in prompts]
    for length in range(1, max_new_tokens + 1):
        tokens = choose(logits, rows=rows, prompts=prompts, answers=answers)
        alive = []
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if not answers[row] or answers[row][-1] not in ends:
                answers[row].append(token)
                alive += [] if token in ends else [place]
        if not alive or length == max_new_tokens:
            break
        if len(alive) < step.worth_dropping * len(rows):
            kept = torch.tensor(alive, device=device)
            step.keep(kept)
            rows, tokens = [rows[place] for place in alive], tokens[kept]
        logits = step(tokens)
        finite(model, "logits", logits)
    return answers


def draws(seeds: Sequence[int], length: int) -> torch.Tensor:
    """Numbers from 0 to 1 [rows, length], each row from its own seed."""
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _choose_next(
    logits: torch.Tensor,
    *,
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    temperature: float,
    draws: torch.Tensor | None,
    adjust: Adjust | None,
) -> torch.Tensor:
    """The next token [B] of each of the `rows`, whose logits [B, V] these are."""
    if adjust is not None:
        so_far = [torch.tensor([[*prompts[row], *answers[row]]], device=logits.device) for row in rows]
        adjusted = zip(rows, so_far, logits, strict=True)
        logits = torch.cat([adjust(ids, len(prompts[row]), one[None]) for row, ids, one in adjusted])
        temperature = float(temperature > 0)
    drawn = None if draws is None else draws[list(rows), max(len(answers[row]) for row in rows)].to(logits.device)
    return choose_tokens(logits, temperature, drawn)


def choose_tokens(logits: torch.Tensor, temperature: float, drawn: torch.Tensor | None = None) -> torch.Tensor:
    """logits [B, V] -> tokens [B]: the best one at temperature 0, else sampled, by the numbers `drawn` [B] if given."""
    if temperature == 0:
        return logits.argmax(-1)
    shares = (logits.float() / temperature).softmax(-1)
    if drawn is None:  # multinomial draws one for each token of the vocabulary
        drawn = torch.rand(len(shares), dtype=torch.float64, device=shares.device)
    reached = shares.double().cumsum(-1)
    return torch.searchsorted(reached, drawn.double()[:, None] * reached[:, -1:], right=True).squeeze(1)


def finite(model: nn.Module, what: str, values: torch.Tensor) -> None:
    """Raises ModelError for what a model gave, unless it is finite; names the weight that is not, if one is."""
    if not is_finite(values):
        check_weights(model, "the model")
        raise ModelError(
            f"the model's {what} are not finite (NaN or infinity), though its weights are: it overflows in this dtype, "
            "or its numbers are out of range; try dtype float32, or an earlier checkpoint"
        )


def score_sequences(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
) -> list[float]:
    """The reward model's score of each sequence of token ids, in their order; the mean of several heads."""
    return [fmean(scores) for scores in score_heads(model, sequences, pad_token_id=pad_token_id, batch_size=batch_size)]


@torch.no_grad()
def score_heads(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int = 32,
) -> list[list[float]]:
    """The score that each head of a reward model gives each sequence of token ids, in their order (right-padded,
    evaluation mode). Sequences that begin alike, as answers to one prompt do, are read as one up to where they differ.
    """
    scores: list[list[float]] = [[] for _ in sequences]
    device = next(model.parameters()).device
    groups, rest = shared_prefixes(sequences)
    with evaluation_mode(model):
        for shared, batch in _score_batches(sequences, groups, rest, batch_size):
            ids, mask = (t.to(device) for t in pad_batch([sequences[i] for i in batch], pad_token_id, left=False))
            cache = None
            if shared:
                cache = LatentCache(model.config)  # pyright: ignore[reportArgumentType]
                model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
                cache.batch_repeat_interleave(len(batch))
            read = {"input_ids": ids[:, shared:], "attention_mask": mask, "past_key_values": cache}
            logits = model(**read, use_cache=cache is not None).logits
            finite(model, "scores", logits)
            for i, score in zip(batch, logits.float().tolist(), strict=True):
                scores[i] = score
    return scores


def _score_batches(
    sequences: Sequence[Sequence[int]], groups: Sequence[Group], rest: Sequence[int], batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """(length of the prefix that is read once, indices into `sequences`) of each batch."""
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
    """(summed cross-entropy in nats, tokens) of each sequence, over the tokens whose mask is 1 but for the first."""
    losses = [(0.0, 0)] * len(sequences)
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for batch in by_length(sequences, batch_size):
            ids, real = pad_batch([sequences[i] for i in batch], pad_token_id, left=False)
            trained, _ = pad_batch([masks[i] for i in batch], 0, left=False)
            ids, real, trained = ids.to(device), real.to(device), trained.to(device)[:, 1:]
            logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
            finite(model, "logits", logits)
            nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            sums = zip((nats * trained).sum(1).tolist(), trained.sum(1).tolist(), strict=True)
            for i, row_sums in zip(batch, sums, strict=True):
                losses[i] = row_sums
    return losses
