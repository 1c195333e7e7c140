"""Canonical rows -> the dataset of token ids and labels that SFTTrainer takes as it is."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from conversations import render_conversation
from conversations.errors import ToolkitError
from conversations.lengths import LengthReport, TooLong, fit
from conversations.rendering import TrainOn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
IGNORED = -100  # torch's cross-entropy leaves out labels of this value
_CHUNK = 10_000
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


def messages_of(row: Row, number: int) -> list[Row]:
    """The conversation of a row. Raises ToolkitError for a row of another form."""
    if "messages" not in row:
        raise ToolkitError(
            f"row {number} is no conversation (it has {', '.join(sorted(row))}); supervised fine-tuning needs "
            "messages: use `dsv2 reward` for preferences"
        )
    return row["messages"]


def encode_rows(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    train_on: TrainOn,
    max_length: int | None,
    too_long: TooLong,
) -> tuple[Dataset, LengthReport]:
    """Columns input_ids and labels (-100 where nothing is trained), and what became of the rows.

    Raises:
        ToolkitError: a row without messages, or no row with anything to train.
    """
    report = LengthReport()

    def pieces() -> Iterator[Row]:
        for number, row in enumerate(rows, 1):
            rendered = render_conversation(messages_of(row, number), tokenizer, train_on=train_on)
            ids_and_mask = rendered["input_ids"], rendered["assistant_mask"]
            for ids, mask in fit(*ids_and_mask, max_length, too_long, report):
                yield {"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]}

    source = pieces()
    chunks = [Dataset.from_list(c, features=_FEATURES) for c in iter(lambda: list(islice(source, _CHUNK)), [])]
    if not chunks:
        raise ToolkitError(f"no row is left to train on: {report.summary(max_length)}")
    return concatenate_datasets(chunks), report
