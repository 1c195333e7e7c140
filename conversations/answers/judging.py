"""Agreement of a scorer with held-out judgments: on pairs, labels and scores. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from conversations.row import PAIR, Message, Row

# [(prompt, answer), ...], each a list of messages -> one score per pair.
Scorer = Callable[[Sequence[tuple[list[Message], list[Message]]]], list[float]]


@dataclass(frozen=True)
class Agreement:
    """The measure ("pair_accuracy", "accuracy" or "mse"), its value for one row, and the scores behind it."""

    name: str
    value: float
    scores: tuple[float, ...]


def is_pair(row: Row) -> bool:
    return all(key in row for key in PAIR)


def judge(scorer: Scorer, rows: Sequence[Row]) -> list[Agreement]:
    """One agreement per row. A pair counts if chosen scores higher than rejected; a tie does not."""
    answer_keys = [("chosen", "rejected") if is_pair(row) else ("completion",) for row in rows]
    scores = iter(
        scorer([(row["prompt"], row[key]) for row, keys in zip(rows, answer_keys, strict=True) for key in keys])
    )
    return [_agreement(row, tuple(next(scores) for _ in keys)) for row, keys in zip(rows, answer_keys, strict=True)]


def _agreement(row: Row, scores: tuple[float, ...]) -> Agreement:
    if is_pair(row):
        return Agreement("pair_accuracy", float(scores[0] > scores[1]), scores)
    if "label" in row:
        return Agreement("accuracy", float((scores[0] > 0) == bool(row["label"])), scores)
    return Agreement("mse", (scores[0] - float(row["score"])) ** 2, scores)


def means(agreements: Sequence[Agreement]) -> dict[str, float]:
    """The mean of each measure, and `n`."""
    names = dict.fromkeys(agreement.name for agreement in agreements)
    return {**{name: fmean(v.value for v in agreements if v.name == name) for name in names}, "n": len(agreements)}


def means_by_kind(rows: Sequence[Row], agreements: Sequence[Agreement]) -> dict[str, dict[str, float]]:
    """`means` for each meta.kind of the rows ("other" if it is missing)."""
    kinds = [str((row.get("meta") or {}).get("kind", "other")) for row in rows]
    return {
        kind: means([v for k, v in zip(kinds, agreements, strict=True) if k == kind]) for kind in sorted(set(kinds))
    }
