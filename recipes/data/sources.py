"""Data entries of a recipe -> rows: files, generated data and hub data sets, mixed by weight."""

import hashlib
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
from conversations.reading.load import RejectedRow, load_conversations
from conversations.reading.locating import Located, locate, names_files
from conversations.rendering.fill_in_the_middle import with_hole
from conversations.row import Refuse, Row
from conversations.sections import DataSource
from recipes.data.hub import hub_file
from recipes.data.mixing import chosen, rows_used
from recipes.data.row_store import MixedRows, RowStore
from recipes.data.splits import Split, parse_split
from recipes.files import file_sha256
from recipes.processes import main_first
from recipes.recipe.paths import GENERATED, is_hub_name

CACHE = Path("runs")
_GENERATED = re.compile(r"tiny:(?P<name>[a-z_]+)(\?(?P<settings>.*))?")


@dataclass(frozen=True)
class Mixture:
    """The rows of a list of sources, and how they came to be.

    rows: canonical rows with their `origin` (file:line); shuffled when there is more than one source, else in the
    file's order. rejected: rows left out. files: for each source {path, sha256, formats, left_out, rows, used}.
    lines: what to tell the user.
    """

    rows: MixedRows
    rejected: list[RejectedRow]
    files: list[dict[str, Any]]
    lines: list[str]


@dataclass(frozen=True)
class _Source:
    """A source with the local file that holds its rows, and which of the file's rows it takes. key: data.0"""

    entry: DataSource
    file: Path
    split: Split
    key: str

    def reads_like(self, other: "_Source") -> bool:
        """Whether the two read some row of one file to one conversation."""
        ways = [(source.entry.columns, source.entry.roles, source.entry.fim) for source in (self, other)]
        return ways[0] == ways[1] and self.split.meets(other.split)


@dataclass(frozen=True)
class _Part:
    """What a source gave: `rows` rows of the store, and what there is to tell of it."""

    rows: int
    file: dict[str, Any]
    rejected: list[RejectedRow]
    lines: list[str]


def read_sources(
    entries: Sequence[DataSource],
    seed: int,
    key: str = "data",
    refuse: Refuse | None = None,
    reasoning: Reasoning = "drop",
) -> Mixture:
    """Read all sources and mix them.

    Args:
        entries: the recipe's data entries.
        seed: of generated data without a seed of its own, of samples by weight, of fill-in-the-middle, and of the
            order.
        key: where in the recipe the entries stand, for errors and for the order of each list.
        refuse: says why a row is of no use to the stage, which makes it a bad row.
        reasoning: what becomes of reasoning beside an answer.

    Raises:
        ToolkitError: a missing file, an unreadable row, an empty source.
    """
    sources = [_find(entry, seed, f"{key}.{index}") for index, entry in enumerate(entries)]
    _refuse_rows_twice(sources)
    store = RowStore()
    parts = [_read(source, store, seed, refuse, reasoning) for source in sources]
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
        rows=MixedRows(store, order, starts),
        rejected=[row for part in parts for row in part.rejected],
        files=files,
        lines=[*(line for part in parts for line in part.lines), *shares],
    )


def _refuse_rows_twice(sources: Sequence[_Source]) -> None:
    """Raises ToolkitError where two entries read the same rows of a file in the same way."""
    files = [{path.resolve() for path in _located(source).paths} for source in sources]
    for index, source in enumerate(sources):
        for other, earlier in enumerate(sources[:index]):
            if source.reads_like(earlier) and (both := sorted(files[index] & files[other])):
                raise ToolkitError(
                    f"{source.key} reads rows of {both[0].name} that {earlier.key} reads too, which would count twice; "
                    "leave one out, and say in weight how often they are used"
                )


def _located(source: _Source) -> Located:
    return locate(source.file, source.split.name if source.file.is_dir() else "")


def source_hash(entry: DataSource, seed: int, key: str) -> str:
    """SHA-256 of what holds a source's rows; generated data and hub data sets are written to a file first.

    Raises:
        ToolkitError: no such file, generator or data set, or a split that it does not have.
    """
    return _sha256(_find(entry, seed, key))


def _sha256(source: _Source) -> str:
    """That of the one file; of several, that of their names and hashes."""
    paths = _located(source).paths
    if paths == (source.file,):
        return file_sha256(source.file)
    lines = [f"{file_sha256(path)}  {os.path.relpath(path, source.file)}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _find(entry: DataSource, seed: int, key: str) -> _Source:
    split = parse_split(entry.split, f"{key}.split")
    path = Path(entry.path)
    if not entry.path.startswith(GENERATED) and not names_files(path):
        if not is_hub_name(entry.path):
            raise ToolkitError(f"{key}.path: no such file: {entry.path}")
        file = main_first(lambda: hub_file(entry.path, split, CACHE / "hub", key))
        return _Source(entry, file, Split(shares=split.shares), key)
    if split.name not in ("", "train") and not path.is_dir():
        raise ToolkitError(
            f"{key}.split: {entry.path} has no splits by name; {split.name!r} is for hub data sets and folders. "
            "Write train[:90%] and train[90%:]"
        )
    return _Source(entry, _generated(entry.path, seed, key) if entry.path.startswith(GENERATED) else path, split, key)


def _read(source: _Source, store: RowStore, seed: int, refuse: Refuse | None, reasoning: Reasoning) -> _Part:
    """Append the source's rows, with their origin, to the store."""
    entry, rejected, before = source.entry, [], len(store)
    reader = load_conversations(
        source.file,
        entry.on_bad_row,
        columns=entry.columns,
        max_bad_rows=entry.max_bad_rows,
        on_rejected=rejected.append if entry.on_bad_row == "skip" else None,
        refuse=_without_text(refuse) if entry.fim else refuse,
        roles=entry.roles,
        reasoning=reasoning,
        split=source.split.name if source.file.is_dir() else "",
    )
    rng = random.Random(f"{seed}/{source.key}/fim")
    for row in source.split.select(row | {"origin": reader.place} for row in reader):
        store.append(with_hole(row, entry.fim.rate, entry.fim.mode, rng) if entry.fim else row)
    reader.check()  # a split by number stops before the end
    if len(store) == before:
        raise ToolkitError(f"{source.key}.split: no row of {entry.path} falls into {entry.split!r}")
    file = {
        "path": entry.path,
        "sha256": _sha256(source),
        "formats": dict(reader.formats),
        "left_out": reader.rejected,
    }
    lines = [reader.summary(), *(f"{source.file.name}: {note}" for note in reader.notes())]
    return _Part(len(store) - before, file, rejected, lines)


def _without_text(refuse: Refuse | None) -> Refuse:
    def refused(row: Row) -> str | None:
        if "text" not in row:
            return "fim is for rows of plain text, which have a key text"
        return refuse(row) if refuse else None

    return refused


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
