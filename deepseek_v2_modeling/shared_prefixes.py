"""Groups of sequences that begin alike, such as the answers to one prompt: what they share is read once."""

import math
from collections.abc import Iterator, Sequence

MIN_SHARED = 64  # tokens; a shorter beginning is read again sooner than it is put into a cache
WORTH = 0.8  # of the tokens of a group: it is read by its prefix where that leaves at most so many

Group = tuple[int, list[int]]  # length of the shared prefix, indices of the sequences


def shared_prefixes(sequences: Sequence[Sequence[int]]) -> tuple[list[Group], list[int]]:
    """(groups whose prefix is worth reading once, the indices of all other sequences).

    A prefix leaves at least one token of each sequence. Sequences are taken in their order as words in a dictionary, in
    which those that begin alike stand side by side.
    """
    groups: list[Group] = []
    rest: list[int] = []
    for shared, group in _runs(sequences):
        longest = max(len(sequences[i]) for i in group)
        left = shared + len(group) * (longest - shared)
        if len(group) > 1 and left <= WORTH * sum(len(sequences[i]) for i in group):
            groups.append((shared, group))
        else:
            rest += group
    return groups, rest


def _runs(sequences: Sequence[Sequence[int]]) -> Iterator[Group]:
    """Neighbours that share MIN_SHARED tokens, and not less than half of what those before them share: a system prompt
    that all rows have does not join the answers to different questions."""
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    group: list[int] = []
    shared = math.inf
    for i in order:
        alike = _alike(sequences[group[-1]], sequences[i]) if group else 0
        if group and alike >= MIN_SHARED and (len(group) == 1 or 2 * alike >= shared):
            group, shared = [*group, i], min(shared, alike)
            continue
        if group:
            yield int(shared) if len(group) > 1 else 0, group
        group, shared = [i], math.inf
    if group:
        yield int(shared) if len(group) > 1 else 0, group


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences share from the beginning, but for the last of the shorter one."""
    most = min(len(one), len(other)) - 1
    return next((place for place in range(most) if one[place] != other[place]), most)
