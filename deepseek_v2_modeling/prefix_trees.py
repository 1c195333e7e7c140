"""Packs sequences of token ids into one row without padding, in which prefixes that several of them share stand once.

The row is a tree of documents: a document continues the one that holds what comes before it. Examples that all
questions begin with are read once, a question once for all its choices, and equal sequences once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

MIN_SHARED = 16  # tokens; reading fewer twice costs less than attending to a document apart
Ids = Sequence[int]


@dataclass
class PackedTree:
    """ids, positions, documents: of each token of the row its id, its position in its sequence and the number of its
    document. prefixes: of each document the number of the earlier one that it continues, or -1.

    begins, depths: of each document its first token's place in the row and its position. ends: the last document of
    each sequence.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def add(self, ids: Ids, depth: int, prefix: int) -> int:
        """Add a document; returns its number."""
        number = len(self.prefixes)
        self.begins.append(len(self.ids))
        self.depths.append(depth)
        self.prefixes.append(prefix)
        self.ids += ids
        self.positions += range(depth, depth + len(ids))
        self.documents += [number] * len(ids)
        return number

    def places(self, sequence: int, positions: range) -> list[int]:
        """The places in the row of a sequence's tokens at these positions."""
        document, places = self.ends[sequence], []
        for position in reversed(positions):
            while position < self.depths[document]:
                document = self.prefixes[document]
            places.append(self.begins[document] + position - self.depths[document])
        return places[::-1]


def pack_tree(sequences: Sequence[Ids]) -> PackedTree:
    """The row of these sequences, none of which is empty."""
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    tree = PackedTree(ends=[-1] * len(sequences))
    # Of sequences order[low:high], which agree up to `known`: those up to `depth` are in the document `prefix`.
    waiting = [(0, len(order), 0, 0, -1)]
    while waiting:
        low, high, known, depth, prefix = waiting.pop()
        first, last = sequences[order[low]], sequences[order[high - 1]]
        shared = common_prefix(first, last, known)
        ended = low
        while ended < high and len(sequences[order[ended]]) == shared:
            ended += 1
        if shared > depth and (shared - depth >= MIN_SHARED or low < ended):
            prefix, depth = tree.add(first[depth:shared], depth, prefix), shared
        for place in order[low:ended]:
            tree.ends[place] = prefix
        waiting += reversed(
            [(*part, shared + 1, depth, prefix) for part in _branches(sequences, order, ended, high, shared)]
        )
    return tree


def _branches(
    sequences: Sequence[Ids], order: Sequence[int], low: int, high: int, position: int
) -> Iterator[tuple[int, int]]:
    """Ranges of order[low:high] whose sequences have the same token at a position."""
    begin = low
    for place in range(low + 1, high + 1):
        if place == high or sequences[order[place]][position] != sequences[order[begin]][position]:
            yield begin, place
            begin = place


def tree_batches(sequences: Sequence[Ids], tokens: int) -> Iterator[list[int]]:
    """Batches of indices into `sequences`, those with common prefixes side by side, each a row of about `tokens` tokens
    at most (more if a sequence is longer)."""
    batch: list[int] = []
    size, before = 0, ()
    for i in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        own = len(sequences[i]) - (common_prefix(before, sequences[i]) if batch else 0)
        if batch and size + own > tokens:
            yield batch
            batch, size, own = [], 0, len(sequences[i])
        batch.append(i)
        size, before = size + own, sequences[i]
    if batch:
        yield batch


def common_prefix(first: Ids, second: Ids, known: int = 0) -> int:
    """The length of the common prefix of two sequences, of which the first `known` tokens are known to agree."""
    low, high = known, min(len(first), len(second))
    while low < high:  # whole slices are compared, by halves: faster than one token after the other
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
