"""Reads the sources of a recipe into a directory with their rows and the counts made while reading."""

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.formats.reasoning import Reasoning
from conversations.progress import bar
from conversations.reading.load import RejectedRow, load_conversations
from conversations.reading.locating import Located, locate
from conversations.rendering.fill_in_the_middle import with_hole
from conversations.row import Refuse, Row
from conversations.sections import DataSource
from recipes.data.row_store import RowWriter
from recipes.data.splits import Split
from recipes.files import file_sha256, write_json

_PARTS, _REJECTED = "sources.json", "rejected.jsonl"


@dataclass(frozen=True)
class Source:
    """A source with its local file and the split of the file that it uses. key: its place in the recipe, as data.0."""

    entry: DataSource
    file: Path
    split: Split
    key: str

    def reads_like(self, other: "Source") -> bool:
        """Whether both would turn some row of the same file into the same conversation."""
        settings = [(source.entry.columns, source.entry.roles, source.entry.fim) for source in (self, other)]
        return settings[0] == settings[1] and self.split.meets(other.split)

    @property
    def located(self) -> Located:
        return locate(self.file, self.split.name if self.file.is_dir() else "")

    @property
    def sha256(self) -> str:
        """Hash of the file; of several files, the hash of their names and hashes."""
        return self._hashed[1]

    @cached_property
    def _hashed(self) -> tuple[list[tuple[int, int]], str]:
        """(the files' state when they were hashed, the hash)"""
        return self._state(), self._hash()

    def _hash(self) -> str:
        paths = self.located.paths
        if paths == (self.file,):
            return file_sha256(self.file)
        lines = [f"{file_sha256(path)}  {os.path.relpath(path, self.file)}\n" for path in paths]
        return sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def has_changed(self) -> bool:
        """Whether the files have changed since they were hashed."""
        return self._hashed[0] != self._state()

    def _state(self) -> list[tuple[int, int]]:
        """Size and modification time of each file, to detect changes."""
        return [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, self.located.paths)]

    def depends_on(self, seed: int) -> dict[str, Any]:
        """Everything that its rows, and the messages about them, depend on."""
        entry = self.entry.model_dump(mode="json", exclude={"weight"})
        drawn = [seed, self.key] if self.entry.fim else None
        return {**entry, "file": str(self.file), "sha256": self.sha256, "notes": self.located.notes, "drawn": drawn}


@dataclass(frozen=True)
class Part:
    """What was read from a source: its number of rows in the store, and messages. file: see Mixture.files."""

    rows: int
    file: dict[str, Any]
    lines: list[str]


def write_rows(
    sources: Sequence[Source], folder: Path, seed: int, refuse: Refuse | None, reasoning: Reasoning, shows: bool
) -> None:
    """Read all sources into files in `folder`, for `RowStore` and `read_parts`.

    Raises:
        ToolkitError: an unreadable row, an empty source, or a file that changes while it is read.
    """
    with (
        RowWriter(folder) as store,
        (folder / _REJECTED).open("w", encoding="utf-8") as rejected,
        bar("reading", None, "rows", shows) as advance,
    ):

        def reject(row: RejectedRow) -> None:
            rejected.write(json.dumps(asdict(row)) + "\n")

        parts = [_read_source(source, store, seed, refuse, reasoning, reject, advance) for source in sources]
    write_json(folder / _PARTS, [asdict(part) for part in parts])


def read_parts(folder: Path) -> tuple[list[Part], list[RejectedRow]]:
    """What was read from each source, and all rejected rows."""
    parts = [Part(**part) for part in json.loads((folder / _PARTS).read_text(encoding="utf-8"))]
    with (folder / _REJECTED).open(encoding="utf-8") as lines:
        return parts, [RejectedRow(**json.loads(line)) for line in lines]


def _read_source(
    source: Source,
    store: RowWriter,
    seed: int,
    refuse: Refuse | None,
    reasoning: Reasoning,
    reject: Callable[[RejectedRow], Any],
    advance: Callable[[int], Any],
) -> Part:
    """Append the source's rows, with their `origin`, to the store."""
    entry, before, sha256 = source.entry, len(store), source.sha256  # hashed before reading, to notice a change
    reader = load_conversations(
        source.file,
        entry.on_bad_row,
        columns=entry.columns,
        max_bad_rows=entry.max_bad_rows,
        on_rejected=reject if entry.on_bad_row == "skip" else None,
        refuse=_without_text(refuse) if entry.fim else refuse,
        roles=entry.roles,
        reasoning=reasoning,
        split=source.split.name if source.file.is_dir() else "",
    )
    rng = random.Random(f"{seed}/{source.key}/fim")
    for row in source.split.select(row | {"origin": reader.place} for row in reader):
        store.append(with_hole(row, entry.fim.rate, entry.fim.mode, rng) if entry.fim else row)
        advance(1)
    reader.check()  # a split by row number stops before the end of the file
    if len(store) == before:
        raise ToolkitError(f"{source.key}.split: no row of {entry.path} falls into {entry.split!r}")
    if source.has_changed:
        raise ToolkitError(f"{source.key}.path: {entry.path} has changed while it was read; start again")
    file = {
        "path": entry.path,
        "sha256": sha256,
        "formats": dict(reader.formats),
        "left_out": reader.rejected,
    }
    lines = [reader.summary(), *(f"{source.file.name}: {note}" for note in reader.notes())]
    return Part(len(store) - before, file, lines)


def _without_text(refuse: Refuse | None) -> Refuse:
    def refused(row: Row) -> str | None:
        if "text" not in row:
            return "fim is for rows of plain text, which have a key text"
        return refuse(row) if refuse else None

    return refused
