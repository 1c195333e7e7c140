"""Data entries of a recipe -> rows: files, generated data and hub data sets, mixed by weight."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from conversations.errors import ToolkitError
from conversations.reading import RejectedRow, load_conversations
from conversations.sections import DataSource
from recipes.files import atomic_path
from recipes.manifest import file_sha256
from recipes.paths import GENERATED, is_hub_name
from recipes.ranks import is_main, wait_for_all

CACHE = Path("runs")
_GENERATED = re.compile(r"tiny:(?P<name>[a-z_]+)(\?(?P<settings>.*))?")

Row = dict[str, Any]


@dataclass
class Mixture:
    """The rows of a list of sources, and how they came to be.

    rows: shuffled when there is more than one source, else in the file's order. rejected: rows left out.
    files: for each source {path, sha256, rows, used}. lines: what to tell the user.
    """

    rows: list[Row] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """A source with the local file that holds its rows."""

    entry: DataSource
    file: Path


def read_sources(entries: Sequence[DataSource], seed: int, key: str = "data") -> Mixture:
    """Read all sources and mix them.

    Args:
        entries: the recipe's data entries.
        seed: of generated data without a seed of its own, of samples by weight, and of the order.
        key: where in the recipe the entries stand, for errors and for the order of each list.

    Raises:
        ToolkitError: a missing file, an unreadable row, an empty source.
    """
    sources = [_Source(entry, local_file(entry, seed, f"{key}.{i}")) for i, entry in enumerate(entries)]
    mixture = Mixture()
    for index, source in enumerate(sources):
        rows = _read(source, mixture)
        rng = random.Random(f"{seed}/{key}/{index}")
        used = weighted(rows, source.entry.weight, rng)
        mixture.files.append(
            {
                "path": source.entry.path,
                "sha256": file_sha256(source.file),
                "rows": len(rows),
                "used": len(used),
            }
        )
        mixture.rows += used
    if len(sources) > 1:
        random.Random(f"{seed}/{key}").shuffle(mixture.rows)
    mixture.lines += _shares(mixture)
    return mixture


def local_file(entry: DataSource, seed: int, key: str) -> Path:
    """The file that holds a source's rows; generated data and hub data sets are written to one first.

    Raises:
        ToolkitError: no such file, generator or data set.
    """
    if entry.path.startswith(GENERATED):
        return _generated(entry.path, seed, key)
    path = Path(entry.path)
    if not path.exists() and is_hub_name(entry.path):
        return _from_hub(entry, key)
    if entry.split is not None:
        raise ToolkitError(f"{key}.split: {entry.split!r} is for hub data sets; {entry.path} is a file")
    if not path.exists():
        raise ToolkitError(f"{key}.path: no such file: {entry.path}")
    return path


def weighted(rows: Sequence[Row], weight: float, rng: random.Random) -> list[Row]:
    """Every row floor(weight) times, and a random share of them once more: 0.5 is half of the rows, at least one."""
    whole, part = divmod(weight, 1)
    extra = round(part * len(rows)) if whole else max(1, round(part * len(rows)))
    chosen = sorted(rng.sample(range(len(rows)), extra))
    return list(rows) * int(whole) + [rows[i] for i in chosen]


def _read(source: _Source, mixture: Mixture) -> list[Row]:
    reader = load_conversations(
        source.file,
        source.entry.on_bad_row,
        columns=source.entry.columns,
        max_bad_rows=source.entry.max_bad_rows,
        on_rejected=mixture.rejected.append,
    )
    rows = list(reader)
    mixture.lines.append(reader.summary())
    return rows


def _shares(mixture: Mixture) -> list[str]:
    """One line for each source of a mixture of several, or of one that is not used as it is."""
    total = len(mixture.rows)
    if len(mixture.files) == 1 and mixture.files[0]["rows"] == total:
        return []
    return [_share(file, total) for file in mixture.files]


def _share(file: dict[str, Any], total: int) -> str:
    share = 100 * file["used"] / total
    return f"{Path(file['path']).name}: {file['used']:,} of {file['rows']:,} rows used, {share:.1f} % of the mixture"


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
    return _on_main_first(lambda: materialize(match["name"], chosen, count, folder))


def _from_hub(entry: DataSource, key: str) -> Path:
    """Load a hub data set and write its rows as JSON lines."""
    name, _, config = entry.path.partition(":")
    split = entry.split or "train"
    label = re.sub(r"[^\w.-]+", "_", f"{name}-{config}-{split}" if config else f"{name}-{split}")
    return _on_main_first(lambda: _download(name, config or None, split, CACHE / "hub" / f"{label}.jsonl", key))


def _download(name: str, config: str | None, split: str, file: Path, key: str) -> Path:
    if file.exists():
        return file
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # whatever the hub, the network or a missing name raises, the user has to mend it
        reason = " ".join(str(error).split())
        raise ToolkitError(
            f"{key}.path: no file {name}, and no hub data set of this name can be loaded: {reason}"
        ) from error
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    return file


def _on_main_first(make: Any) -> Path:
    """Let the main process make a file; the others find it."""
    if is_main():
        made = make()
        wait_for_all()
        return made
    wait_for_all()
    return make()
