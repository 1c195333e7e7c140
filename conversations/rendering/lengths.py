"""Counts what happens to rows that are too long."""

import json
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from conversations.tally import counted

TooLong = Literal["truncate", "drop", "split"]

CUT_AWAY = "answer cut off entirely"
_COUNTS, _LENGTHS = "report.json", "lengths.npy"


@dataclass
class LengthReport:
    """How many rows were truncated, split or left out.

    truncated: rows that lost their end (or, if split, the end of an exchange that is too long by itself) and are
    trained. split: rows that became several. cut_exchanges: exchanges of split rows that lost their whole answer.
    unfilled: texts too long for fill-in-the-middle. margins: pairs with a margin. rejected: rows left out: number (from
    1), origin and reason. lengths: the length of each row in tokens, before any of this.
    """

    rows: int = 0
    truncated: int = 0
    split: int = 0
    cut_exchanges: int = 0
    unfilled: int = 0
    margins: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)
    lengths: array = field(default_factory=lambda: array("L"))

    def reject(self, reason: str, row: Mapping[str, Any] | None = None) -> None:
        """Reject the row that was counted last."""
        origin = {"origin": row["origin"]} if row and "origin" in row else {}
        self.rejected.append({"row": self.rows, **origin, "reason": reason})

    def summary(self, max_length: int | None) -> str:
        """One line for the user on how the rows were handled: "4,000 rows; 12 truncated to 256 tokens"."""
        counts = {
            f"{self.truncated:,} truncated to {max_length} tokens": self.truncated,
            f"{self.split:,} split at turns into parts of up to {max_length} tokens": self.split,
            f"{self.unfilled:,} too long for fill-in-the-middle, kept as plain text": self.unfilled,
            f"{counted(self.cut_exchanges, 'exchange')} of split rows dropped ({CUT_AWAY})": self.cut_exchanges,
            f"{self.rows - self.margins:,} without a margin, which counts as 0": 0 < self.margins < self.rows,
            **{f"{count:,} dropped ({why})": count for why, count in self._reasons().items()},
        }
        return "; ".join([counted(self.rows), *(words for words, count in counts.items() if count)])

    def nothing_left(self, max_length: int | None) -> str:
        """The error message for data without a single row to train on."""
        shortest = min(self.lengths, default=0)
        too_short = max_length is not None and shortest > max_length
        remedy = f"; the shortest row has {shortest:,} tokens: raise training.max_length" if too_short else ""
        return f"no row is left to train on: {self.summary(max_length)}{remedy}"

    def as_metrics(self) -> dict[str, int]:
        return {
            "rows": self.rows,
            "truncated": self.truncated,
            "split": self.split,
            "dropped": len(self.rejected),
            "answer_cut_away": self._reasons()[CUT_AWAY],
        }

    def write(self, folder: Path) -> None:
        """Write to files in the folder, for `read`."""
        import numpy

        counts = {name: value for name, value in vars(self).items() if name != "lengths"}
        (folder / _COUNTS).write_text(json.dumps(counts), encoding="utf-8")
        numpy.save(folder / _LENGTHS, numpy.asarray(self.lengths))

    @classmethod
    def read(cls, folder: Path) -> "LengthReport":
        """Read what `write` wrote."""
        import numpy

        counts = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
        return cls(**counts, lengths=array("L", numpy.load(folder / _LENGTHS).astype("L").tobytes()))

    def _reasons(self) -> Counter[str]:
        return Counter(row["reason"] for row in self.rejected)
