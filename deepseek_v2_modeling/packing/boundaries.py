"""Finds packed documents from a collator's outputs, and refuses to combine packed documents with a cache."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..errors import ModelError
from .layouts import find_documents

BOUNDARIES = ("cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
JUMP = 2**31  # more than any position
REMEDY = (
    "a cache holds one sequence per row; otherwise documents would attend to one another. Give packed documents "
    "with an empty cache and do not continue with it, or give each document a row of its own"
)


def documents_of(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    boundaries: Mapping[str, Any],
    shape: tuple[int, int],
) -> torch.Tensor | None:
    """Like `find_documents`, with boundaries under the names that collators use: cu_seq_lens_q or cu_seq_lens, or
    seq_idx (the document number of each token)."""
    starts, index = boundaries.get("cu_seq_lens_q"), boundaries.get("seq_idx")
    if starts is None:
        starts = boundaries.get("cu_seq_lens")
    if starts is None and index is not None:
        if position_ids is None or position_ids.ndim != 2:
            position_ids = torch.arange(shape[1], device=index.device).unsqueeze(0)
        position_ids = position_ids + index.long() * JUMP  # positions are not consecutive where the number changes
    return find_documents(position_ids, attention_mask, starts, shape)


def documents_with_cache(
    cache: Cache | None,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    boundaries: Mapping[str, Any],
    shape: tuple[int, int],
) -> torch.Tensor | None:
    """The documents of a forward; None with a filled cache, where each row continues one sequence.

    Single tokens are not checked, so that decoding never waits for a GPU; compiled code is not checked either.

    Raises:
        ModelError: the cache holds packed documents, or a new document starts on a filled cache.
    """
    holder: Any = cache
    if cache is None or not cache.get_seq_length():
        documents = documents_of(position_ids, attention_mask, boundaries, shape)
        if cache is not None:
            holder.holds_documents = are_several(documents)
        return documents
    if getattr(holder, "holds_documents", False):
        raise ModelError(f"the cache was filled with packed documents, and this forward continues it: {REMEDY}")
    if shape[1] > 1 and not torch.compiler.is_compiling():
        documents = documents_of(position_ids, attention_mask, boundaries, shape)
        if are_several(documents) or starts_anew(position_ids, attention_mask, shape[1]):
            raise ModelError(f"a new document starts (by its position_ids or boundaries) on a filled cache: {REMEDY}")
    return None


def are_several(documents: torch.Tensor | None) -> bool:
    """Whether a row holds more than one document; always False in compiled code, which cannot read values."""
    return documents is not None and not torch.compiler.is_compiling() and bool(documents.any())


def starts_anew(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, queries: int) -> bool:
    """Whether a real token has position 0 in a row that has real tokens in the cache. In a row whose cached tokens are
    all padding this is valid, and a 4-D mask defines by itself which tokens attend to which."""
    if position_ids is None or position_ids.ndim != 2:
        return False
    first = position_ids == 0
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            return False
        real = attention_mask.bool()
        first = first & real[:, -queries:] & real[:, :-queries].any(-1, keepdim=True)
    return bool(first.any())
