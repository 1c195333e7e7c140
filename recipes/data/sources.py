"""Data entries of a recipe -> rows: files, generated data and hub data sets, mixed by weight."""

import os
import random
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from conversations.errors import ToolkitError
from conversations.formats.reasoning import Reasoning
from conversations.reading.load import RejectedRow
from conversations.reading.locating import names_files
from conversations.row import Refuse
from conversations.row_cache import RowCache
from conversations.sections import DataSource
from recipes.data.hub import hub_file
from recipes.data.mixing import chosen, rows_used
from recipes.data.reading import Source, read_parts, write_rows
from recipes.data.row_store import MixedRows, RowStore
from recipes.data.splits import Split, parse_split
from recipes.processes import main_first
from recipes.recipe.paths import GENERATED, is_hub_name

CACHE = Path(os.environ.get("DSV2_CACHE") or "runs")  # what is made or fetched for runs: demo data, rows of a hub
_GENERATED = re.compile(r"tiny:(?P<name>[a-z_]+)(\?(?P<settings>.*))?")


@dataclass(frozen=True)
class Mixture:
    """The rows of a list of sources, and how they came to be.

    rows: canonical rows with their `origin` (file:line); shuffled when there is more than one source, else in the
    file's order. rejected: rows left out. files: for each source {path, sha256, formats, left_out, rows, used}.
    lines: what to tell the user of them. read: how they were read, or where they were found.
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
        seed: of generated data without a seed of its own, of samples by weight, of fill-in-the-middle, and of the
            order.
        key: where in the recipe the entries stand, for errors and for the order of each list.
        refuse: says why a row is of no use to the stage, which makes it a bad row.
        reasoning: what becomes of reasoning beside an answer.
        cache: of the rows read; without it they go to a temporary directory.
        refuses_by: what `refuse` depends on, as JSON; without it nothing is cached.

    Raises:
        ToolkitError: a missing file, an unreadable row, an empty source.
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
    """Raises ToolkitError where two entries read the same rows of a file in the same way."""
    files = [{path.resolve() for path in source.located.paths} for source in sources]
    for index, source in enumerate(sources):
        for other, earlier in enumerate(sources[:index]):
            if source.reads_like(earlier) and (both := sorted(files[index] & files[other])):
                raise ToolkitError(
                    f"{source.key} reads rows of {both[0].name} that {earlier.key} also reads, so they would count "
                    "twice; remove one, and set weight to use its rows more often"
                )


def source_hash(entry: DataSource, seed: int, key: str) -> str:
    """SHA-256 of what holds a source's rows; generated data and hub data sets are written to a file first.

    Raises:
        ToolkitError: no such file, generator or data set, or a split that it does not have.
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
    return Source(entry, _generated(entry.path, seed, key) if entry.path.startswith(GENERATED) else path, split, key)


def _share(file: dict[str, Any], total: int) -> str:
    """What a source gave to a mixture of several."""
    rows, used = file["rows"], file["used"]
    often = f"{used:,} of {rows:,} rows used" if used <= rows else f"{rows:,} rows used {used / rows:.3g} times each"
    return f"{Path(file['path']).name}: {often}, {100 * used / total:.1f} % of the mixture"


def _generated(path: str, seed: int, key: str) -> Path:
    """Make `tiny:NAME?seed=&n=` and say where it is."""
    from recipes.tiny.world import materialize

    match = _GENERATED.fullmatch(path)
    settings = dict(parse_qsl(match["settings"] or "", keep_blank_values=True)) if match else {}
    numbers = {name: int(value) for name, value in settings.items() if value.isdecimal()}
    if match is None or not {"seed", "n"}.issuperset(settings) or len(numbers) != len(settings):
        raise ToolkitError(f"{key}.path: {path!r} is not tiny:NAME, tiny:NAME?seed=7 or tiny:NAME?seed=7&n=1000")
    chosen = numbers.get("seed", seed)
    count = numbers.get("n")
    folder = CACHE / "tiny" / "data" / f"seed-{chosen}"
    return main_first(lambda: materialize(match["name"], chosen, count, folder))
