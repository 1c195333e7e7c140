"""Encodes the texts of rows in batches, on all cores, while earlier rows are being used."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from conversations.rendering.encoding import EncodedTexts, Run, encode_texts, texts_of
from conversations.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 1 << 20  # of text per tokenizer call, which bounds memory
_ROWS = 2000
_PARALLEL = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class Prepared:
    """A row with the runs that are encoded for it. encoded: ids of texts of this and other rows; texts that are
    encoded later are added."""

    row: Row
    runs: list[Run]
    encoded: EncodedTexts


def encoded_ahead(
    rows: Iterable[Row], runs_of: Callable[[Row], list[Run]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[list[Prepared]]:
    """The rows in order, in batches, each row with the ids of all its texts.

    Raises:
        ToolkitError: as `runs_of` and `encode_texts`.
    """
    waiting: deque[tuple[list[tuple[Row, list[Run]]], Future[EncodedTexts]]] = deque()
    with _all_cores(), ThreadPoolExecutor(1) as worker:
        for batch in _batches(rows, runs_of):
            texts = list(chain.from_iterable(texts_of(runs) for _, runs in batch))
            waiting.append((batch, worker.submit(encode_texts, texts, tokenizer)))
            if len(waiting) > 1:
                yield _prepared(*waiting.popleft())
        while waiting:
            yield _prepared(*waiting.popleft())


def _prepared(batch: list[tuple[Row, list[Run]]], encoded: "Future[EncodedTexts]") -> list[Prepared]:
    ids = encoded.result()
    return [Prepared(row, runs, ids) for row, runs in batch]


def _batches(rows: Iterable[Row], runs_of: Callable[[Row], list[Run]]) -> Iterator[list[tuple[Row, list[Run]]]]:
    batch, size = [], 0
    for row in rows:
        runs = runs_of(row)
        batch.append((row, runs))
        size += sum(map(len, texts_of(runs)))
        if size >= _CHARACTERS or len(batch) == _ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _all_cores() -> Iterator[None]:
    """Turns on the tokenizer's own threads, which are off elsewhere: a fork while they run could deadlock."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = before
