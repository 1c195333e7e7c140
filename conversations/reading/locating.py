"""Resolves a data path to the files that hold its rows: a file, the members of a .zip, a folder, or a pattern.

Files of a folder or a pattern are read in alphabetical order; a folder written by `save_to_disk` of the datasets
library, in its own order. A folder may hold splits, as folders or files named train, test or validation.
"""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.reading.data_file import KINDS, DataFile, Unpacked, data_file, has_known_kind

_ZIP = ".zip"
# Files of a data set that hold no rows.
_SIDECARS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_QUIET = {"README.md", "LICENSE", "LICENSE.txt", *_SIDECARS}
# Words in file and folder names -> the split, following the hub's convention.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_SPLIT = re.compile(rf"(?:^|[^a-z])({'|'.join(_SPLITS)})(?=$|[^a-z])")


@dataclass(frozen=True)
class Located:
    """paths: the files on disk, for hashing. files: the files to read, in order. notes: for the user."""

    paths: tuple[Path, ...]
    files: tuple[DataFile, ...]
    notes: tuple[str, ...] = ()


def locate(path: Path, split: str = "") -> Located:
    """The files of a data path.

    split: the name of one of a folder's splits; "" takes train if there are several.

    Raises:
        ToolkitError: the file or split does not exist, or no file has a known kind.
    """
    if path.is_dir():
        return _folder(path, split)
    if not path.exists() and has_magic(str(path)):
        matches = _matches(path)
        located = [
            locate(match, split) for match in matches if match.is_dir() or (_is_data(match) and _has_rows(match))
        ]
        if not located:
            raise ToolkitError(f"{path}: the pattern matches no file of a supported type")
        return Located(
            tuple(file for found in located for file in found.paths),
            tuple(file for found in located for file in found.files),
            tuple(note for found in located for note in found.notes),
        )
    return Located((path,), tuple(_members(path)))


def names_files(path: Path) -> bool:
    """Whether a data path names any file."""
    return path.exists() or (has_magic(str(path)) and bool(_matches(path)))


def _matches(pattern: Path) -> list[Path]:
    """The paths that a pattern matches, without folders whose contents it matches too (as `data/**` does)."""
    text = re.sub(r"(\*\*/)+", "**/", str(pattern))  # repeated `**/` takes forever and means the same as one
    paths = sorted({Path(name) for name in glob(text, recursive=True)})
    parents = {parent for path in paths for parent in path.parents}
    return [path for path in paths if path not in parents]


def _is_data(path: Path) -> bool:
    return path.suffix.lower() == _ZIP or has_known_kind(path)


def _members(path: Path) -> Iterable[DataFile]:
    """The file itself, or the members of a .zip."""
    if path.suffix.lower() != _ZIP or not path.exists():
        return [data_file(path)]
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ToolkitError(f"{path}: cannot be read: {error}") from error
    entries = sorted((info for info in archive.infolist() if not info.is_dir()), key=lambda info: info.filename)
    unpacked = Unpacked(path.stat().st_size)
    try:
        for info in entries:
            unpacked.add(info.file_size)
    except OSError as error:
        raise ToolkitError(f"{path}: {error}") from None
    names = [info.filename for info in entries if not _is_hidden(Path(info.filename))]
    members = [name for name in names if has_known_kind(Path(name)) and _has_rows(Path(name))]
    if twice := next((name for name, number in Counter(members).items() if number > 1), None):
        raise ToolkitError(f"{path} contains {twice} twice; pack it again with one of them")
    if not members:
        raise ToolkitError(f"{path} contains no file of a supported type ({', '.join(KINDS)}), but {_listed(names)}")
    return [data_file(zipfile.Path(archive, name)) for name in members]


def _folder(path: Path, split: str) -> Located:
    saved = path / "dataset_dict.json"
    if saved.is_file():
        names = _json(saved).get("splits") or []
        chosen = _chosen(path, split, _texts(saved, names))
        return _noted(_folder(path / chosen, ""), path, chosen, [name for name in names if name != chosen])
    if (path / "state.json").is_file() and (files := _json(path / "state.json").get("_data_files")):
        listed = files if isinstance(files, list) else [files]
        filenames = [file.get("filename") if isinstance(file, dict) else file for file in listed]
        paths = tuple(path / name for name in _texts(path / "state.json", filenames))
        return Located(paths, tuple(map(data_file, paths)))
    everything = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
    data = [file for file in everything if _is_data(file) and _has_rows(file)]
    unread = [str(file.relative_to(path)) for file in everything if file not in data and file.name not in _QUIET]
    if not data:
        types = ", ".join([*KINDS, _ZIP])
        raise ToolkitError(f"{path} contains no file of a supported type ({types}), but {_listed(unread)}")
    located = _split_files(path, data, split)
    notes = (*located.notes, *([f"files of unsupported types, not read: {_listed(unread)}"] if unread else []))
    return Located(located.paths, tuple(file for data_path in located.paths for file in _members(data_path)), notes)


def _split_files(path: Path, data: Sequence[Path], split: str) -> Located:
    """The files of one split, if the folder has several."""
    by_split: dict[str, list[Path]] = {}
    for file in data:
        words = _SPLIT.findall(str(file.relative_to(path)).lower())
        by_split.setdefault(_SPLITS[words[-1]] if words else "", []).append(file)
    splits = [name for name in by_split if name]
    if (len(splits) < 2 and not split) or (split == "train" and not splits):
        return Located(tuple(data), ())
    chosen = _chosen(path, split, splits)
    other_splits = [name or "files outside any split" for name in by_split if name != chosen]
    return _noted(Located(tuple(by_split[chosen]), ()), path, chosen, other_splits)


def _chosen(path: Path, split: str, names: Sequence[str]) -> str:
    match = next((name for name in (split, _SPLITS.get(split, split)) if name in names), None)
    if not split:
        match = "train" if "train" in names else names[0] if len(names) == 1 else None
    if match is None:
        missing = f"no split {split!r}" if split else "several splits and none called train"
        raise ToolkitError(f"{path} has {missing}; it has {', '.join(names) or 'none'}: choose one with split")
    return match


def _noted(located: Located, path: Path, chosen: str, unread: Sequence[str]) -> Located:
    note = (f"split {chosen} of {path.name}; not read: {', '.join(unread)}",) if unread else ()
    return Located(located.paths, located.files, (*note, *located.notes))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _has_rows(path: Path) -> bool:
    return path.name not in _SIDECARS and not (path.suffix == ".arrow" and path.name.startswith("cache-"))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ToolkitError(f"{path}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _texts(path: Path, names: Any) -> list[str]:
    """The file names in a data set's metadata; raises ToolkitError for any that is not directly in its folder."""
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or Path(name).name != name:
            raise ToolkitError(f"{path}: names {name!r}, which is not a file or folder next to it")
    return names


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(names[:5]) or "nothing"
    return text + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
