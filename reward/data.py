"""Canonical rows -> token ids for a reward model: pairs, or single answers with a verdict."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from datasets import Dataset

from conversations import render_conversation
from conversations.answers.judging import is_pair
from conversations.errors import ToolkitError
from conversations.rendering.fitting import Encode, Piece
from conversations.rendering.lengths import LengthReport, TooLong
from conversations.row import JUDGED, PAIR, VERDICTS, Row
from reward.config import RewardRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = (*PAIR[1:], "completion")


def encoder(recipe: RewardRecipe, tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> Encode:
    """What becomes of one row: its answers, a pair or one, are trained on together."""

    def encode(row: Row, report: LengthReport) -> list[list[Piece]]:
        report.rows += 1
        sequences = [answer_ids(row["prompt"], row[key], tokenizer, None) for key in ANSWERS if key in row]
        report.lengths.append(max(map(len, sequences)))
        kept = fitted(sequences, max_length, recipe.format.too_long, report)
        return [[(ids, [0] * len(ids)) for ids in kept]] if kept else []

    return encode


def answer_ids(
    prompt: list[Row], answer: list[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> list[int]:
    """A conversation that ends in the answer. The score is read at its end, so a long one loses its beginning."""
    ids = render_conversation([*prompt, *answer], tokenizer)["input_ids"]
    return ids if max_length is None else ids[-max_length:]


def encode_pairs(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", *, max_length: int | None, too_long: TooLong
) -> tuple[Dataset, LengthReport]:
    """Columns chosen_ids and rejected_ids, and what became of the rows.

    Raises:
        ToolkitError: a row that is no pair, or nothing left.
    """
    report, found = LengthReport(), []
    for row in rows:
        report.rows += 1
        if not is_pair(row):
            raise ToolkitError(
                f"row {report.rows} is not a pair (it has {', '.join(sorted(row))}); it needs {', '.join(PAIR)}, "
                "or loss: pointwise for judged answers"
            )
        pair = [answer_ids(row["prompt"], row[key], tokenizer, None) for key in PAIR[1:]]
        kept = fitted(pair, max_length, too_long, report)
        if kept:
            found.append({"chosen_ids": kept[0], "rejected_ids": kept[1]})
    return _dataset(found, report, max_length), report


def encode_judged(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", *, max_length: int | None, too_long: TooLong
) -> tuple[Dataset, str, LengthReport]:
    """Columns input_ids and target, which verdict the rows hold ("label" or "score"), and what became of them.

    Raises:
        ToolkitError: a row without a verdict, labels and scores in one data set, or nothing left.
    """
    report, found, verdicts = LengthReport(), [], set()
    for row in rows:
        report.rows += 1
        verdict = next((name for name in VERDICTS if name in row), None)
        if verdict is None or not all(key in row for key in JUDGED):
            raise ToolkitError(
                f"row {report.rows} is not a judged answer (it has {', '.join(sorted(row))}); loss: pointwise needs "
                "prompt, completion and a label or a score"
            )
        verdicts.add(verdict)
        ids = answer_ids(row["prompt"], row["completion"], tokenizer, None)
        kept = fitted([ids], max_length, too_long, report)
        if kept:
            found.append({"input_ids": kept[0], "target": float(row[verdict])})
    if len(verdicts) > 1:
        raise ToolkitError("data: some rows have a label and some a score; train on one kind at a time")
    return _dataset(found, report, max_length), next(iter(verdicts), ""), report


def fitted(
    sequences: list[list[int]], max_length: int | None, too_long: TooLong, report: LengthReport
) -> list[list[int]]:
    """The sequences of a row, cut at the beginning; none when the row is left out."""
    if max_length is None or all(len(ids) <= max_length for ids in sequences):
        return sequences
    if too_long == "split":
        raise ToolkitError("format.too_long: split is for conversations; a reward model needs truncate or drop")
    if too_long == "drop":
        report.reject(f"longer than {max_length} tokens")
        return []
    report.truncated += 1
    return [ids[-max_length:] for ids in sequences]


def _dataset(found: list[Row], report: LengthReport, max_length: int | None) -> Dataset:
    if not found:
        raise ToolkitError(f"no row is left to train on: {report.summary(max_length)}")
    return Dataset.from_list(found)
