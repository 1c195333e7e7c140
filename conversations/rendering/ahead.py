"""Rows whose texts are encoded many at a time, on all cores, while the rows before them are used."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from conversations.rendering.encoding import Known, Run, encode_texts, texts_of
from conversations.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 1 << 20  # of the texts that the tokenizer gets at once, so that memory does not grow with the rows
_ROWS = 2000
_PARALLEL = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class Prepared:
    """A row as what is encoded of it. known: the ids of its texts, and of other rows'; what is encoded later joins
    them."""

    row: Row
    runs: list[Run]
    known: Known


def encoded_ahead(
    rows: Iterable[Row], runs_of: Callable[[Row], list[Run]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[list[Prepared]]:
    """The rows in their order, in batches, each row with the ids of all its texts.

    Raises:
        ToolkitError: as `runs_of` and `encode_texts`.
    """
    waiting: deque[tuple[list[tuple[Row, list[Run]]], Future[Known]]] = deque()
    with _all_cores(), ThreadPoolExecutor(1) as worker:
        for batch in _batches(rows, runs_of):
            texts = list(chain.from_iterable(texts_of(runs) for _, runs in batch))
            waiting.append((batch, worker.submit(encode_texts, texts, tokenizer)))
            if len(waiting) > 1:
                yield _prepared(*waiting.popleft())
        while waiting:
            yield _prepared(*waiting.popleft())


def _prepared(batch: list[tuple[Row, list[Run]]], encoded: "Future[Known]") -> list[Prepared]:
    known = encoded.result()
    return [Prepared(row, runs, known) for row, runs in batch]


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
    """The tokenizer's own threads, which are off elsewhere: processes that are forked later must not wait for them."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = before
