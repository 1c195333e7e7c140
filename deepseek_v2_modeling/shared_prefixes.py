"""Groups sequences with a common prefix, such as answers to one prompt, so that the prefix is computed once."""

import math
from collections.abc import Iterator, Sequence

MIN_SHARED = 64  # tokens; recomputing a shorter prefix is cheaper than caching it
WORTH = 0.8  # a prefix is shared if at most this fraction of the group's tokens is then left to compute

Group = tuple[int, list[int]]  # length of the shared prefix, indices of the sequences


def shared_prefixes(sequences: Sequence[Sequence[int]]) -> tuple[list[Group], list[int]]:
    """(groups whose prefix is worth computing once, the indices of all other sequences).

    At least one token of each sequence is left after its prefix. Sequences are sorted lexicographically, so those with
    a common prefix are adjacent.
    """
    groups: list[Group] = []
    rest: list[int] = []
    for shared, group in _runs(sequences):
        longest = max(len(sequences[i]) for i in group)
        remaining = shared + len(group) * (longest - shared)
        if len(group) > 1 and remaining <= WORTH * sum(len(sequences[i]) for i in group):
            groups.append((shared, group))
        else:
            rest += group
    return groups, rest


def read_once(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many first tokens of each prompt are worth reading once for all prompts that begin with them; 0 for none.

    Without that, each different prompt is read once; with it, what comes after those tokens is read for every prompt,
    also where several are the same.
    """
    copies: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        copies.setdefault(tuple(prompt), []).append(place)
    distinct, shared_by = list(copies), [0] * len(prompts)
    for shared, group in shared_prefixes(distinct)[0]:
        members = [distinct[i] for i in group]
        remaining = shared + sum(len(copies[prompt]) * (len(prompt) - shared) for prompt in members)
        if remaining <= WORTH * sum(map(len, members)):
            for place in (place for prompt in members for place in copies[prompt]):
                shared_by[place] = shared
    return shared_by


def _runs(sequences: Sequence[Sequence[int]]) -> Iterator[Group]:
    """Runs of adjacent sequences that share at least MIN_SHARED tokens and at least half of the prefix that the run
    shares so far, so that a system prompt common to all rows does not merge the answers to different questions."""
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    group: list[int] = []
    shared = math.inf
    for i in order:
        common = _common_prefix(sequences[group[-1]], sequences[i]) if group else 0
        if group and common >= MIN_SHARED and (len(group) == 1 or 2 * common >= shared):
            group, shared = [*group, i], min(shared, common)
            continue
        if group:
            yield int(shared) if len(group) > 1 else 0, group
        group, shared = [i], math.inf
    if group:
        yield int(shared) if len(group) > 1 else 0, group


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common prefix of two sequences, which always excludes the last token of the shorter one."""
    limit = min(len(first), len(second)) - 1
    return next((place for place in range(limit) if first[place] != second[place]), limit)
