"""What happens to token ids that are longer than a run allows, and the count of it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

TooLong = Literal["truncate", "drop", "split"]


@dataclass
class LengthReport:
    """How many rows were cut, split, or left out (`rejected`: row, counted from 1, and reason)."""

    rows: int = 0
    truncated: int = 0
    split: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def reject(self, reason: str) -> None:
        """Leaves out the row that was counted last."""
        self.rejected.append({"row": self.rows, "reason": reason})

    def summary(self, max_length: int | None) -> str:
        """One line for the user, of what was done to the rows: "4,000 rows; 12 truncated to 256 tokens"."""
        said = {
            f"{self.truncated:,} truncated to {max_length} tokens": self.truncated,
            f"{self.split:,} split into parts of {max_length} tokens": self.split,
            **{f"{n:,} left out: {why}": n for why, n in Counter(row["reason"] for row in self.rejected).items()},
        }
        return "; ".join([f"{self.rows:,} rows", *(text for text, n in said.items() if n)])

    def as_metrics(self) -> dict[str, int]:
        return {"rows": self.rows, "truncated": self.truncated, "split": self.split, "dropped": len(self.rejected)}


def fit(
    input_ids: list[int],
    mask: list[int],
    max_length: int | None,
    too_long: TooLong,
    report: LengthReport,
) -> Iterator[tuple[list[int], list[int]]]:
    """The pieces of a row (ids and loss mask) that are trained on, none longer than max_length; counted in `report`.

    "truncate" keeps the start. "split" cuts into pieces of max_length; later pieces see nothing of the earlier ones.
    A piece without a trained token is left out.
    """
    report.rows += 1
    length = len(input_ids)
    limit = length if max_length is None else max_length
    if length > limit and too_long == "drop":
        report.reject(f"longer than {limit} tokens")
        return
    report.truncated += length > limit and too_long == "truncate"
    report.split += length > limit and too_long == "split"
    end = length if too_long == "split" else min(length, limit)
    found = 0
    for start in range(0, end, max(1, limit)):
        piece = slice(start, min(start + limit, end))
        if any(mask[piece]):
            found += 1
            yield input_ids[piece], mask[piece]
    if not found:
        report.reject("nothing in it is trained")
