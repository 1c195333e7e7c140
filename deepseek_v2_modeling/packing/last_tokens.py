"""Finds the tokens at which a score is computed: the last real token of each row, or of each packed document."""

from collections.abc import Mapping
from typing import Any

import torch

from .boundaries import BOUNDARIES, documents_of

Places = tuple[torch.Tensor, torch.Tensor]


def real_runs(attention_mask: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
    """The mask [B, T] as booleans, if each row's real tokens are contiguous and not empty, so that rows can be packed
    as documents; otherwise None."""
    if attention_mask is None or attention_mask.shape != shape:
        return None
    real = attention_mask.bool()
    begun, unfinished = real.cummax(-1).values, real.flip(-1).cummax(-1).values.flip(-1)
    return real if bool((real.any(-1, keepdim=True) & (real == (begun & unfinished))).all()) else None


def packed_rows(values: torch.Tensor, real: torch.Tensor, least: int = 0) -> Places:
    """The real tokens of values [B, T] or [B, T, D] as one row of documents, with their positions [1, N]. A document of
    zeros at the end makes it at least `least` tokens long."""
    packed, places = values[real], (real.cumsum(-1) - 1)[real]
    missing = max(0, least - len(packed))
    if missing:
        packed = torch.cat((packed, packed.new_zeros(missing, *packed.shape[1:])))
        places = torch.cat((places, torch.arange(missing, device=places.device)))
    return packed[None], places[None]


def repeated(places: Places, least: int) -> Places:
    """The places, with the last one repeated until there are at least `least`."""
    missing = max(0, least - len(places[0]))
    rows, columns = (torch.cat((place, place[-1:].expand(missing))) for place in places)
    return rows, columns


def scored_tokens(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    boundaries: Mapping[str, Any],
    pad_token_id: int | None,
    shape: tuple[int, int],
) -> Places:
    """`last_tokens` with the documents found from positions or boundaries."""
    if position_ids is None and not any(boundaries.get(name) is not None for name in BOUNDARIES):
        return last_tokens(input_ids, attention_mask, None, pad_token_id, shape)
    return _last_tokens_of_documents(input_ids, attention_mask, position_ids, boundaries, pad_token_id, shape)


@torch.compiler.disable()
def _last_tokens_of_documents(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    boundaries: Mapping[str, Any],
    pad_token_id: int | None,
    shape: tuple[int, int],
) -> Places:
    """Excluded from compilation, because compiled code cannot determine the number of documents."""
    documents = documents_of(position_ids, attention_mask, boundaries, shape)
    return last_tokens(input_ids, attention_mask, documents, pad_token_id, shape)


def last_tokens(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    pad_token_id: int | None,
    shape: tuple[int, int],
) -> Places:
    """(row, column) indices of the scored tokens of a batch of shape [B, T]; documents as from `documents_of`.

    Padding is taken from the mask. Without one, tokens with the padding id are padding, except in a packed batch: there
    all tokens are real, since a document may end with that id (often pad = eos).
    """
    mask = attention_mask[:, -shape[1] :].bool() if attention_mask is not None and attention_mask.ndim == 2 else None
    if documents is not None:
        last = torch.ones_like(documents, dtype=torch.bool)
        last[:, :-1] = documents[:, 1:] != documents[:, :-1]
        rows, places = (last if mask is None else last & mask).nonzero(as_tuple=True)
        return rows, places
    if mask is None and (input_ids is None or pad_token_id is None):
        device = input_ids.device if input_ids is not None else None
        return torch.arange(shape[0], device=device), torch.full((shape[0],), shape[1] - 1, device=device)
    real = mask if mask is not None else input_ids != pad_token_id
    assert isinstance(real, torch.Tensor)
    places = torch.arange(shape[1], device=real.device)
    return torch.arange(shape[0], device=real.device), (places * real).argmax(-1)
