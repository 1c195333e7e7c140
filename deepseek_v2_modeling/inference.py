"""Batched generation, reward scores and token losses for lists of token ids, batched by length to minimise padding.

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
    """The token ids that end an answer: the tokenizer's EOS token and those listed in generation_config.json.

    Without that file transformers derives a generation config from config.json; those values are ignored in favour of
    the tokenizer's.
    """
    config = model.generation_config
    stated = None if config._from_model_config else config.eos_token_id
    listed = [[tokenizer.eos_token_id], stated if isinstance(stated, list) else [stated]]
    return sorted({i for ids in listed for i in ids if i is not None and i < model.config.vocab_size})


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
    """Generate one answer per prompt, in the order of the prompts: token ids, including the end token if one was
    generated.

    Equivalent to `generate` on each batch, but identical prompts are prefilled once, and finished answers leave the
    batch. The model's mode (training or evaluation) is restored afterwards.

    Args:
        temperature: 0 is greedy decoding.
        seeds: one per prompt; they make sampling reproducible without touching the global generator, and each answer
            independent of the rest of its batch.
        adjust: processes a row's logits before a token is chosen, and applies the temperature too:
            (ids so far [1, T], length of the prompt, logits [1, V]) -> logits [1, V].

    Raises:
        ModelError: the logits are NaN or infinite.
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
    """The answers of one batch. `rows` maps each row of the cache to its prompt; rows are dropped once they have
    ended."""
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
    """Uniform random numbers in [0, 1) [rows, length], each row from its own seed."""
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
    """The next token [B] of each of `rows`, chosen from their logits [B, V]."""
    if adjust is not None:
        so_far = [torch.tensor([[*prompts[row], *answers[row]]], device=logits.device) for row in rows]
        adjusted = zip(rows, so_far, logits, strict=True)
        logits = torch.cat([adjust(ids, len(prompts[row]), row_logits[None]) for row, ids, row_logits in adjusted])
        temperature = float(temperature > 0)  # `adjust` has applied it
    drawn = None if draws is None else draws[list(rows), max(len(answers[row]) for row in rows)].to(logits.device)
    return choose_tokens(logits, temperature, drawn)


def choose_tokens(logits: torch.Tensor, temperature: float, drawn: torch.Tensor | None = None) -> torch.Tensor:
    """logits [B, V] -> tokens [B]: argmax at temperature 0, else sampled; `drawn` [B] are the uniform random numbers to
    sample with."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if drawn is None:  # torch.multinomial would draw a number for each token of the vocabulary
        drawn = torch.rand(len(probabilities), dtype=torch.float64, device=probabilities.device)
    cumulative = probabilities.double().cumsum(-1)
    return torch.searchsorted(cumulative, drawn.double()[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def finite(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Raise ModelError if a model's outputs are not finite; the message names a non-finite weight if there is one."""
    if not is_finite(values):
        check_weights(model, "the model")
        raise ModelError(
            f"the model's {name} are not finite (NaN or infinity), though its weights are: it overflows in this dtype, "
            "or its numbers are out of range; try dtype float32, or an earlier checkpoint"
        )


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
            inputs = {"input_ids": ids[:, shared:], "attention_mask": mask, "past_key_values": cache}
            logits = model(**inputs, use_cache=cache is not None).logits
            finite(model, "scores", logits)
            for i, score in zip(batch, logits.float().tolist(), strict=True):
                scores[i] = score
    return scores


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
