"""Held-out rows on several processes: each counts once, in batches that all processes have alike."""

from collections import Counter
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from deepseek_v2_modeling.training.held_out import HeldOutBatches


@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_each_row_counts_once(rows: int, size: int, processes: int, whole: bool) -> None:
    parts = [HeldOutBatches(rows, size, process, processes, whole) for process in range(processes)]
    counts: Counter[int] = Counter()
    for part in parts:
        assert [len(batch) for batch in part] == [len(batch) for batch in parts[0]]
        assert part.readers == parts[0].readers and len(part) == len(part.batches)
        for batch, readers in zip(part, part.readers, strict=True):
            assert 1 <= len(batch) <= size
            counts.update(dict.fromkeys(batch, Fraction(1, readers)))  # pyright: ignore[reportArgumentType]
    assert counts == dict.fromkeys(range(rows), 1)
    if whole:
        blocks = {tuple(range(start, min(start + size, rows))) for start in range(0, rows, size)}
        assert {tuple(batch) for part in parts for batch in part} == blocks
