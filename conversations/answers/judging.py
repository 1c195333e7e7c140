"""Does a scorer agree with held-out verdicts: pairs ranked right, labels hit, scores met. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from conversations.row import PAIR, Message, Row

# (prompt, answer), each a list of messages, -> a score for each.
Scorer = Callable[[Sequence[tuple[list[Message], list[Message]]]], list[float]]


@dataclass(frozen=True)
class Verdict:
    """What is measured ("pair_accuracy", "accuracy" or "mse"), its value for this row, and the scores behind it."""

    name: str
    value: float
    scores: tuple[float, ...]


def is_pair(row: Row) -> bool:
    return all(key in row for key in PAIR)


def judge(scorer: Scorer, rows: Sequence[Row]) -> list[Verdict]:
    """One verdict a row. A pair counts when chosen scores higher than rejected; a tie does not."""
    parts = [("chosen", "rejected") if is_pair(row) else ("completion",) for row in rows]
    scores = iter(scorer([(row["prompt"], row[key]) for row, keys in zip(rows, parts, strict=True) for key in keys]))
    return [_verdict(row, tuple(next(scores) for _ in keys)) for row, keys in zip(rows, parts, strict=True)]


def _verdict(row: Row, scores: tuple[float, ...]) -> Verdict:
    if is_pair(row):
        return Verdict("pair_accuracy", float(scores[0] > scores[1]), scores)
    if "label" in row:
        return Verdict("accuracy", float((scores[0] > 0) == bool(row["label"])), scores)
    return Verdict("mse", (scores[0] - float(row["score"])) ** 2, scores)


def means(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The mean of each thing measured, and `n`."""
    names = dict.fromkeys(verdict.name for verdict in verdicts)
    return {**{name: fmean(v.value for v in verdicts if v.name == name) for name in names}, "n": len(verdicts)}


def means_by_kind(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """`means` for each meta.kind of the rows ("other" where it is missing)."""
    kinds = [str((row.get("meta") or {}).get("kind", "other")) for row in rows]
    return {kind: means([v for k, v in zip(kinds, verdicts, strict=True) if k == kind]) for kind in sorted(set(kinds))}
