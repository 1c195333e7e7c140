"""Turns the data entries of a recipe into rows: files, generated data and hub data sets, mixed by weight."""

import os
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.formats.reasoning import Reasoning
from conversations.reading.load import RejectedRow
from conversations.reading.locating import names_files
from conversations.row import Refuse
from conversations.row_cache import RowCache
from conversations.sections import DataSource
from recipes.data.generated import generated
from recipes.data.hub import hub_file
from recipes.data.mixing import chosen, rows_used
from recipes.data.reading import Source, read_parts, write_rows
from recipes.data.row_store import MixedRows, RowStore
from recipes.data.splits import Split, parse_split
from recipes.processes import main_first
from recipes.recipe.paths import GENERATED, is_hub_name

CACHE = Path(os.environ.get("DSV2_CACHE") or "runs")  # generated demo data and rows fetched from the hub


@dataclass(frozen=True)
class Mixture:
    """The rows of a list of sources, and where they came from.

    rows: canonical rows with their `origin` (file:line); shuffled if there is more than one source, else in file
    order. rejected: rows left out. files: for each source {path, sha256, formats, left_out, rows, used}.
    lines: messages about the rows for the user. read: a line saying whether they were read or came from the cache.
    """

    rows: MixedRows
    rejected: list[RejectedRow]
    files: list[dict[str, Any]]
    lines: list[str]
    read: str = ""


def read_sources(
    entries: Sequence[DataSource],
    seed: int,
    key: str = "data",
    refuse: Refuse | None = None,
    reasoning: Reasoning = "drop",
    cache: RowCache | None = None,
    refuses_by: Any = None,
) -> Mixture:
    """Read all sources, or reuse them from the cache, and mix them.

    Args:
        entries: the recipe's data entries.
        seed: for generated data without its own seed, sampling by weight, fill-in-the-middle, and the order.
        key: the entries' key in the recipe, for errors and to seed each list's order.
        refuse: returns why the stage cannot use a row, which is then a bad row.
        reasoning: how to handle reasoning given beside an answer.
        cache: holds the rows read; without one they go to a temporary directory.
        refuses_by: what `refuse` depends on, as JSON; without it nothing is cached.

    Raises:
        ToolkitError: a missing file, an unreadable row, or an empty source.
    """
    cache = cache or RowCache()
    sources = [_find(entry, seed, f"{key}.{index}") for index, entry in enumerate(entries)]
    _refuse_rows_twice(sources)
    depends_on = None
    if cache.folder is not None and (refuse is None or refuses_by is not None):
        read = [source.depends_on(seed) for source in sources]
        depends_on = {"sources": read, "refuses_by": refuses_by, "reasoning": reasoning}
    entry = cache.entry(
        "rows", depends_on, lambda folder: write_rows(sources, folder, seed, refuse, reasoning, cache.shows)
    )
    parts, rejected = read_parts(entry.folder)
    used = rows_used([part.rows for part in parts], [entry.weight for entry in entries])
    starts = list(accumulate((part.rows for part in parts), initial=0))[:-1]
    order = array("Q")
    for index, (start, part, count) in enumerate(zip(starts, parts, used, strict=True)):
        order.extend(start + row for row in chosen(part.rows, count, random.Random(f"{seed}/{key}/{index}")))
    if len(parts) > 1:
        random.Random(f"{seed}/{key}").shuffle(order)
    files = [{**part.file, "rows": part.rows, "used": count} for part, count in zip(parts, used, strict=True)]
    shares = [_share(file, len(order)) for file in files] if len(files) > 1 else []
    return Mixture(
        rows=MixedRows(RowStore(entry.folder), order, starts, entry.folder.name if entry.stored else None),
        rejected=rejected,
        files=files,
        lines=[*(line for part in parts for line in part.lines), *shares],
        read=entry.line("read", sum(part.rows for part in parts)),
    )


def _refuse_rows_twice(sources: Sequence[Source]) -> None:
    """Raise ToolkitError if two entries read the same rows of a file in the same way."""
    files = [{path.resolve() for path in source.located.paths} for source in sources]
    for index, source in enumerate(sources):
        for number, earlier in enumerate(sources[:index]):
            if source.reads_like(earlier) and (shared := sorted(files[index] & files[number])):
                raise ToolkitError(
                    f"{source.key} reads rows of {shared[0].name} that {earlier.key} also reads, so they would count "
                    "twice; remove one, and set weight to use its rows more often"
                )


def source_hash(entry: DataSource, seed: int, key: str) -> str:
    """SHA-256 of a source's files; generated data and hub data sets are written to a file first.

    Raises:
        ToolkitError: the file, generator, data set or split does not exist.
    """
    return _find(entry, seed, key).sha256


def _find(entry: DataSource, seed: int, key: str) -> Source:
    split = parse_split(entry.split, f"{key}.split")
    path = Path(entry.path)
    if not entry.path.startswith(GENERATED) and not names_files(path):
        if not is_hub_name(entry.path):
            raise ToolkitError(f"{key}.path: no such file: {entry.path}")
        file = main_first(lambda: hub_file(entry.path, split, CACHE / "hub", key))
        return Source(entry, file, Split(shares=split.shares), key)
    if split.name not in ("", "train") and not path.is_dir():
        raise ToolkitError(
            f"{key}.split: {entry.path} has no splits by name; {split.name!r} is for hub data sets and folders. "
            "Write train[:90%] and train[90%:]"
        )
    return Source(
        entry, generated(entry.path, seed, key, CACHE) if entry.path.startswith(GENERATED) else path, split, key
    )


def _share(file: dict[str, Any], total: int) -> str:
    """One line about a source's share of a mixture."""
    rows, used = file["rows"], file["used"]
    often = f"{used:,} of {rows:,} rows used" if used <= rows else f"{rows:,} rows used {used / rows:.3g} times each"
    return f"{Path(file['path']).name}: {often}, {100 * used / total:.1f} % of the mixture"
