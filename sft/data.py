"""Encodes canonical rows as the data set of token ids and labels that SFTTrainer trains on without further
processing."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy
from datasets import Dataset, Features, List, Value

from conversations.errors import ToolkitError
from conversations.rendering.ahead import encoded_ahead
from conversations.rendering.conversation import TrainOn
from conversations.rendering.encoded import Columns, EncodedRows, encoded_dataset, key_of, labelled, lengths_of
from conversations.rendering.fitting import Encode, Fitter, Piece
from conversations.rendering.lengths import LengthReport, TooLong
from conversations.row import Row
from conversations.row_cache import RowCache
from deepseek_v2_modeling.training import IGNORED
from sft.config import SftRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "origin": Value("string")})


def encoder(recipe: SftRecipe, tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> Encode:
    """The encoding function for a row: each piece of the row is a separate training sample."""
    fitter = Fitter(tokenizer, max_length, recipe.format.too_long, recipe.format.train_on)
    return lambda row, report: [[piece] for piece in fitter.pieces(row, report)]


def check_row(row: Row, number: int) -> Row:
    """Return the row if it holds a conversation or plain text; otherwise raise ToolkitError."""
    if "messages" not in row and "text" not in row:
        raise ToolkitError(
            f"row {number} is not a conversation (it has {', '.join(sorted(row))}); supervised fine-tuning needs "
            "messages or text: use `dsv2 reward` for preferences"
        )
    return row


def encode_rows(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    train_on: TrainOn,
    max_length: int | None,
    too_long: TooLong,
    cache: RowCache | None = None,
) -> EncodedRows:
    """Encode rows into the columns input_ids, labels (-100 on tokens without a loss) and origin, with a length report.

    The data set is memory-mapped from a cached or temporary file, so memory does not grow with it.

    Raises:
        ToolkitError: a row has neither messages nor text, or no row has trained tokens.
    """
    fitter = Fitter(tokenizer, max_length, too_long, train_on)
    checked = (check_row(row, number) for number, row in enumerate(rows, 1))

    def encoded(report: LengthReport) -> Iterator[Columns]:
        for batch in encoded_ahead(checked, fitter.runs, tokenizer):
            origins: list[str] = []
            pieces: list[Piece] = []
            for prepared in batch:
                row_pieces = list(fitter.fit(prepared, report))
                origins += [prepared.row.get("origin", f"row {report.rows}")] * len(row_pieces)
                pieces += row_pieces
            columns = labelled([ids for ids, _ in pieces], [mask for _, mask in pieces], IGNORED)
            yield {**columns, "origin": origins}

    key = key_of(rows, tokenizer, stage="sft", train_on=train_on, max_length=max_length, too_long=too_long)
    count = len(rows) if isinstance(rows, Sequence) else None
    return encoded_dataset(cache or RowCache(), key, _FEATURES, encoded, rows=count, max_length=max_length)


def origins_of(data: Dataset, documents: Iterable[list[int]]) -> list[str]:
    """The origins of the rows with these token ids, in the order of the documents. Each origin of identical rows is
    listed once."""
    origins_by_ids: dict[tuple[int, ...], dict[str, None]] = {tuple(ids): {} for ids in documents}
    candidates = numpy.isin(lengths_of(data), [len(ids) for ids in origins_by_ids]).nonzero()[0]
    rows: Any = data.select(candidates)
    for row in rows:
        origins_by_ids.get(tuple(row["input_ids"]), {})[row["origin"]] = None
    return [origin for origins in origins_by_ids.values() for origin in origins]
