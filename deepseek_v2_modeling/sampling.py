"""Chooses the next tokens from logits: by one random number a row.

`torch.multinomial` draws a number for each token of the vocabulary and takes nine tenths of its time for them. Here a
row's number is a share of its summed probability, and the token is where the running sum passes it: of blocks of tokens
first, then of the tokens in that block, so that only as much is summed up one after the other.

B rows, V tokens of the vocabulary, Q blocks of them.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

BLOCK = 256  # tokens


def draws(seeds: Sequence[int], length: int) -> torch.Tensor:
    """Numbers from 0 to 1 [rows, length] float64, each row from a generator of its own."""
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(length, generator=one, dtype=torch.float64) for one in generators])


def choose_tokens(logits: torch.Tensor, temperature: float, drawn: torch.Tensor | None = None) -> torch.Tensor:
    """logits [B, V] -> tokens [B]: the best one at temperature 0, else sampled, by the numbers `drawn` [B] from 0 to 1
    if given. A token whose probability is 0 in float32 is never sampled."""
    if temperature == 0:
        return logits.argmax(-1)
    if drawn is None:
        drawn = torch.rand(len(logits), dtype=torch.float64, device=logits.device)
    scaled = logits if temperature == 1 else logits.float() / temperature
    return tokens_at(scaled.softmax(-1, dtype=torch.float32), drawn.to(logits.device, torch.float64))


def tokens_at(shares: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """[B]: in each row of shares [B, V] the first token at which their running sum exceeds `drawn` [B] of their sum."""
    words = shares.shape[1]
    whole = words // BLOCK * BLOCK
    sums = shares[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    if whole < words:
        sums = torch.cat((sums, shares[:, whole:].sum(-1, keepdim=True)), dim=-1)
    block, share = _passed(sums.double(), drawn)
    places = block[:, None] * BLOCK + torch.arange(BLOCK, device=shares.device)
    within = shares.gather(1, places.clamp(max=words - 1)).double()
    if whole < words:
        within = within.masked_fill(places >= words, 0.0)
    return block * BLOCK + _passed(within, share)[0]


def _passed(parts: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the first of parts [B, Q] at which their running sum exceeds `drawn` [B] of their sum, the share of that part at
    which it does). Never one that adds nothing to the sum."""
    reached = parts.cumsum(-1)
    total = reached[:, -1:]
    wanted = torch.minimum(drawn[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(reached, wanted, right=True)
    before = F.pad(reached, (1, 0)).gather(1, place)
    share = (wanted - before) / (reached.gather(1, place) - before)
    return place.squeeze(1), share.squeeze(1)
