"""Some rows at a time: what operations make of them on the way stays in the CPU's cache."""

from collections.abc import Iterator

IN_CACHE = 2**19  # values of a chain of operations: 1 MiB in bf16


def row_blocks(rows: int, values_a_row: int, values: int) -> Iterator[slice]:
    """Rows in as few equal blocks of at most `values` values as there can be; the last may be shorter."""
    step = max(1, values // max(1, values_a_row))
    step = -(-rows // max(1, -(-rows // step)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, max(1, step)))
