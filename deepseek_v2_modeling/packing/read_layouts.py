"""Where a few tokens of packed documents attend: the last layer computes only those whose hidden state is used.

R tokens that are read, n of them in each document of a bucket at most, S tokens that the documents see at most.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .last_tokens import Places
from .layouts import continued_tokens, document_lengths

FILL = 0.5  # the fewest tokens that a document of a bucket sees, as a fraction of the most


@dataclass
class ReadBucket:
    """queries [documents, n]: which of the R tokens. keys [documents, S]: flat indices of the tokens that each document
    sees. mask [documents, 1, n, S]: True where a query may attend. All are filled up with repetitions."""

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor


@dataclass
class ReadLayout:
    """buckets: documents that see similarly many tokens. places [R]: where the R tokens are in the concatenation of
    the buckets' queries. most: the largest n."""

    buckets: list[ReadBucket]
    places: torch.Tensor
    most: int

    def to(self, device: Any) -> "ReadLayout":
        """A copy on another device; accelerate's dispatch calls this for layers on other devices."""
        buckets = [ReadBucket(b.queries.to(device), b.keys.to(device), b.mask.to(device)) for b in self.buckets]
        return ReadLayout(buckets, self.places.to(device), self.most)


def read_layout(documents: torch.Tensor, prefixes: torch.Tensor | None, read: Places) -> ReadLayout:
    """The layout for the tokens at `read`, in the order of the flat batch; only neighbours may be the same token.

    documents [B, T], prefixes: as `pack_layout` takes them. The host waits for a GPU.
    """
    lengths = document_lengths(documents).tolist()
    begins = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    contexts = continued_tokens(begins[:-1], lengths, prefixes, documents.device)
    flat = read[0] * documents.shape[1] + read[1]
    distinct, number = flat.unique_consecutive(return_inverse=True)
    first = torch.searchsorted(number, torch.arange(len(distinct), device=flat.device))
    by_document: dict[int, list[int]] = {}
    owner = torch.searchsorted(torch.tensor(begins[1:]), distinct.cpu(), right=True)
    for token, document in enumerate(owner.tolist()):
        by_document.setdefault(document, []).append(token)
    tokens = distinct.tolist()
    seen = {}
    for document, reads in by_document.items():
        own = torch.arange(begins[document], tokens[reads[-1]] + 1, device=flat.device)
        context = contexts[document]
        seen[document] = own if context is None else torch.cat((context, own))
    buckets, order = [], []
    rest = sorted(by_document, key=lambda document: -len(seen[document]))
    while rest:
        members = [document for document in rest if len(seen[document]) >= FILL * len(seen[rest[0]])]
        rest = rest[len(members) :]
        bucket, placed = _bucket([by_document[d] for d in members], [seen[d] for d in members], distinct, first)
        buckets.append(bucket)
        order += placed
    places = torch.empty(len(distinct), dtype=torch.int64)
    for place, token in enumerate(order):
        if token >= 0:
            places[token] = place
    return ReadLayout(buckets, places.to(flat.device)[number], max(map(len, by_document.values())))


def _bucket(
    reads: list[list[int]], seen: list[torch.Tensor], distinct: torch.Tensor, first: torch.Tensor
) -> tuple[ReadBucket, list[int]]:
    """(the bucket, the distinct token of each of its queries, -1 for repetitions).

    reads: the distinct tokens of each document. seen: what its last one sees, itself at the end. first: the first of
    the R tokens that is each distinct one.
    """
    most, longest = max(map(len, reads)), max(map(len, seen))
    filled = torch.tensor([[*tokens, *[tokens[-1]] * (most - len(tokens))] for tokens in reads], device=first.device)
    keys = torch.stack([torch.cat((tokens, tokens[-1:].expand(longest - len(tokens)))) for tokens in seen])
    # A query sees as many of the keys as the last one does, but for the tokens between the two.
    last = distinct[filled][:, -1:]
    sees = torch.tensor([len(tokens) for tokens in seen], device=first.device)[:, None] - (last - distinct[filled])
    mask = torch.arange(longest, device=first.device) < sees[..., None]
    placed = [token for tokens in reads for token in [*tokens, *[-1] * (most - len(tokens))]]
    return ReadBucket(first[filled], keys, mask[:, None]), placed
