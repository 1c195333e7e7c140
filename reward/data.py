"""Canonical rows -> token ids for a reward model: pairs, or single answers with a verdict."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow
from datasets import Features, List, Value

from conversations.answers.judging import is_pair
from conversations.errors import ToolkitError
from conversations.rendering.ahead import encoded_ahead
from conversations.rendering.conversation import conversation_runs
from conversations.rendering.encoded import Columns, EncodedRows, encoded_dataset, id_lists, key_of
from conversations.rendering.encoding import Known, Run, encode_runs
from conversations.rendering.fitting import Encode, Piece
from conversations.rendering.lengths import LengthReport, TooLong
from conversations.row import JUDGED, PAIR, VERDICTS, Row
from conversations.row_cache import RowCache
from reward.config import RewardRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = (*PAIR[1:], "completion")
_IDS = List(Value("int32"))
_PAIRS = Features({**{f"{key}_ids": _IDS for key in PAIR[1:]}, "answer_tokens": Value("int32")})
_JUDGED = Features({"input_ids": _IDS, "target": Value("float64")})


def encoder(recipe: RewardRecipe, tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> Encode:
    """What becomes of one row: its answers, a pair or one, are trained on together."""

    def encode(row: Row, report: LengthReport) -> list[list[Piece]]:
        sequences = [answer_ids(row["prompt"], row[key], tokenizer, None) for key in ANSWERS if key in row]
        fitted = _counted(sequences, max_length, recipe.format.too_long, report)
        return [[(ids, [0] * len(ids)) for ids in fitted]] if fitted else []

    return encode


def answer_ids(
    prompt: list[Row],
    answer: list[Row],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    known: Known | None = None,
) -> list[int]:
    """A conversation that ends in the answer. The score is read at its end, so a long one loses its beginning.

    known: as of encode_runs.
    """
    ids = _encoded(prompt, answer, tokenizer, known)["input_ids"]
    return ids if max_length is None else ids[-max_length:]


def _encoded(
    prompt: list[Row], answer: list[Row], tokenizer: "PreTrainedTokenizerBase", known: Known | None
) -> dict[str, list[int]]:
    """`encode_runs` of a conversation that ends in the answer."""
    return encode_runs(conversation_runs([*prompt, *answer], tokenizer), tokenizer, known)


def _last_turn(mask: list[int]) -> int:
    """How many tokens at the end are an assistant's turn that may be trained on, its end token included."""
    return next((count for count, trained in enumerate(reversed(mask)) if not trained), len(mask))


def encode_pairs(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    too_long: TooLong,
    cache: RowCache | None = None,
) -> EncodedRows:
    """Columns chosen_ids, rejected_ids and answer_tokens (how many tokens at the end of chosen_ids are the answer's
    last turn), and what became of the rows.

    Raises:
        ToolkitError: a row that is no pair, or nothing left.
    """

    def checked() -> Iterator[Row]:
        for number, row in enumerate(rows, 1):
            if not is_pair(row):
                raise ToolkitError(
                    f"row {number} is not a pair (it has {', '.join(sorted(row))}); it needs {', '.join(PAIR)}, "
                    "or loss: pointwise for judged answers"
                )
            yield row

    def encoded(report: LengthReport) -> Iterator[Columns]:
        for batch in _answers_ahead(checked(), tokenizer, PAIR[1:]):
            found, answers = [], []
            for _, answered in batch:
                if fitted := _counted([one["input_ids"] for one in answered], max_length, too_long, report):
                    found.append(fitted)
                    answers.append(_last_turn(answered[0]["assistant_mask"]))
            ids = {f"{key}_ids": id_lists([pair[place] for pair in found]) for place, key in enumerate(PAIR[1:])}
            yield {**ids, "answer_tokens": pyarrow.array(answers, pyarrow.int32())}

    columns = sorted(_PAIRS)
    key = key_of(
        rows, tokenizer, stage="reward", loss="pairwise", max_length=max_length, too_long=too_long, columns=columns
    )
    count = len(rows) if isinstance(rows, Sequence) else None
    return encoded_dataset(cache or RowCache(), key, _PAIRS, encoded, rows=count, max_length=max_length)


def encode_judged(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    too_long: TooLong,
    cache: RowCache | None = None,
) -> EncodedRows:
    """Columns input_ids and target (the label or the score), and what became of the rows.

    Raises:
        ToolkitError: a row without a verdict, labels and scores in one data set, or nothing left.
    """

    def checked() -> Iterator[Row]:
        verdicts = set()
        for number, row in enumerate(rows, 1):
            verdicts.add(verdict_of(row, number))
            if len(verdicts) > 1:
                raise ToolkitError("data: some rows have a label and some a score; train on one kind at a time")
            yield row

    def encoded(report: LengthReport) -> Iterator[Columns]:
        for batch in _answers_ahead(checked(), tokenizer, JUDGED[1:]):
            found, targets = [], []
            for row, answered in batch:
                if fitted := _counted([one["input_ids"] for one in answered], max_length, too_long, report):
                    found += fitted
                    targets.append(float(row[verdict_of(row, report.rows)]))
            yield {"input_ids": id_lists(found), "target": targets}

    key = key_of(rows, tokenizer, stage="reward", loss="pointwise", max_length=max_length, too_long=too_long)
    count = len(rows) if isinstance(rows, Sequence) else None
    return encoded_dataset(cache or RowCache(), key, _JUDGED, encoded, rows=count, max_length=max_length)


def verdict_of(row: Row, number: int) -> str:
    """Which verdict a row holds: "label" or "score". Raises ToolkitError for a row that is no judged answer."""
    verdict = next((name for name in VERDICTS if name in row), None)
    if verdict is None or not all(key in row for key in JUDGED):
        raise ToolkitError(
            f"row {number} is not a judged answer (it has {', '.join(sorted(row))}); loss: pointwise needs "
            "prompt, completion and a label or a score"
        )
    return verdict


def _answers_ahead(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", keys: Sequence[str]
) -> Iterator[list[tuple[Row, list[dict[str, list[int]]]]]]:
    """Rows in batches, each with the ids and masks of the answers that it has under these keys."""

    def runs_of(row: Row) -> list[Run]:
        return [run for key in keys for run in conversation_runs([*row["prompt"], *row[key]], tokenizer)]

    for batch in encoded_ahead(rows, runs_of, tokenizer):
        yield [
            (one.row, [_encoded(one.row["prompt"], one.row[key], tokenizer, one.known) for key in keys])
            for one in batch
        ]


def _counted(
    sequences: list[list[int]], max_length: int | None, too_long: TooLong, report: LengthReport
) -> list[list[int]]:
    """`fitted`, of a row that is counted here."""
    report.rows += 1
    report.lengths.append(max(map(len, sequences)))
    return fitted(sequences, max_length, too_long, report)


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
