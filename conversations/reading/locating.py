"""Resolves a data path to the files that hold its rows: a file, the members of a .zip, a folder, or a pattern.

Files of a folder or a pattern are read in the order of their names. A folder that `save_to_disk` of the library
datasets wrote is read in its own order. A folder may hold splits: in folders or files called train, test, validation.
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
# Words in names of files and folders -> the split, as the hub reads them.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_SPLIT = re.compile(rf"(?:^|[^a-z])({'|'.join(_SPLITS)})(?=$|[^a-z])")


@dataclass(frozen=True)
class Located:
    """paths: the files on disk, for a hash. files: what is read, in order. notes: what the user should know."""

    paths: tuple[Path, ...]
    files: tuple[DataFile, ...]
    notes: tuple[str, ...] = ()


def locate(path: Path, split: str = "") -> Located:
    """The files of a data path.

    split: the name of one of a folder's splits; "" takes train where there are several.

    Raises:
        ToolkitError: the file or split does not exist, or no file has a known kind.
    """
    if path.is_dir():
        return _folder(path, split)
    if not path.exists() and has_magic(str(path)):
        matches = _matches(path)
        located = [locate(each, split) for each in matches if each.is_dir() or (_is_data(each) and _has_rows(each))]
        if not located:
            raise ToolkitError(f"{path}: the pattern matches no file of a supported type")
        return Located(
            tuple(file for each in located for file in each.paths),
            tuple(file for each in located for file in each.files),
            tuple(note for each in located for note in each.notes),
        )
    return Located((path,), tuple(_members(path)))


def names_files(path: Path) -> bool:
    """Whether a data path names any file."""
    return path.exists() or (has_magic(str(path)) and bool(_matches(path)))


def _matches(pattern: Path) -> list[Path]:
    """What a pattern names, each file once: of `data/**`, which names folders and all that is in them, the latter."""
    text = re.sub(r"(\*\*/)+", "**/", str(pattern))  # repeated `**/` takes forever, and means the same as one
    paths = sorted({Path(name) for name in glob(text, recursive=True)})
    around = {parent for each in paths for parent in each.parents}
    return [each for each in paths if each not in around]


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
        named = [file.get("filename") if isinstance(file, dict) else file for file in listed]
        paths = tuple(path / name for name in _texts(path / "state.json", named))
        return Located(paths, tuple(map(data_file, paths)))
    everything = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
    data = [file for file in everything if _is_data(file) and _has_rows(file)]
    others = [str(file.relative_to(path)) for file in everything if file not in data and file.name not in _QUIET]
    if not data:
        types = ", ".join([*KINDS, _ZIP])
        raise ToolkitError(f"{path} contains no file of a supported type ({types}), but {_listed(others)}")
    located = _of_split(path, data, split)
    notes = (*located.notes, *([f"files of unsupported types, not read: {_listed(others)}"] if others else []))
    return Located(located.paths, tuple(file for each in located.paths for file in _members(each)), notes)


def _of_split(path: Path, data: Sequence[Path], split: str) -> Located:
    """The files of one split, where the folder has several."""
    by_split: dict[str, list[Path]] = {}
    for file in data:
        words = _SPLIT.findall(str(file.relative_to(path)).lower())
        by_split.setdefault(_SPLITS[words[-1]] if words else "", []).append(file)
    named = [name for name in by_split if name]
    if (len(named) < 2 and not split) or (split == "train" and not named):
        return Located(tuple(data), ())
    chosen = _chosen(path, split, named)
    others = [name or "files outside any split" for name in by_split if name != chosen]
    return _noted(Located(tuple(by_split[chosen]), ()), path, chosen, others)


def _chosen(path: Path, split: str, names: Sequence[str]) -> str:
    wanted = next((name for name in (split, _SPLITS.get(split, split)) if name in names), None)
    if not split:
        wanted = "train" if "train" in names else names[0] if len(names) == 1 else None
    if wanted is None:
        missing = f"no split {split!r}" if split else "several splits and none called train"
        raise ToolkitError(f"{path} has {missing}; it has {', '.join(names) or 'none'}: choose one with split")
    return wanted


def _noted(located: Located, path: Path, chosen: str, others: Sequence[str]) -> Located:
    note = (f"split {chosen} of {path.name}; not read: {', '.join(others)}",) if others else ()
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
    """Paths of the files that a data set's metadata lists; they are in its folder."""
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or Path(name).name != name:
            raise ToolkitError(f"{path}: names {name!r}, which is not a file or folder next to it")
    return names


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
