"""Reads headers of safetensors files, writes such files as a stream, and creates directories atomically.

The format (huggingface/safetensors, README "Format"): the header's length in 8 bytes little-endian, a JSON header
{name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ModelError
from .full_disk import is_full

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
FLOATS = ("F64", "F32", "F16", "BF16")
CODES = {dtype: code for code, dtype in DTYPES.items()}
Progress = Callable[[int, int], None]  # bytes written since the last call, total bytes


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a header. dtype: the format's own code, e.g. "BF16"."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @classmethod
    def of(cls, dtype: torch.dtype, shape: Iterable[int]) -> "TensorInfo":
        return cls(CODES[dtype], tuple(shape))


def info_of(source: Any) -> TensorInfo:
    """The entry of a header for a tensor, a slice of a file, or an entry itself; of a dtype that the format lacks, the
    name of torch's."""
    if isinstance(source, TensorInfo):
        return source
    if isinstance(source, torch.Tensor):
        code = CODES.get(source.dtype, str(source.dtype).removeprefix("torch."))
        return TensorInfo(code, tuple(source.shape))
    return TensorInfo(source.get_dtype(), tuple(source.get_shape()))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """{name: info} of a safetensors file, read from its header alone.

    Raises:
        ModelError: the file is truncated or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        infos = {name: _checked_info(name, entry) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError("it is cut short")
        with safe_open(path, "pt"):  # the library checks the rest
            return infos
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
    ) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from error


def _checked_info(name: str, entry: Any) -> TensorInfo:
    shape = entry["shape"]
    if not isinstance(entry["dtype"], str) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"{name} has the type {entry['dtype']!r} and the shape {shape!r}")
    return TensorInfo(entry["dtype"], tuple(shape))


def base_files(base: Path) -> list[Path]:
    """The safetensors files of a model directory, in order; if there are both a single file and shards, the single
    file, as in transformers. Raises ModelError if one is missing."""
    single, index = (base / name for name in WEIGHT_FILES)
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{base}: no weights; {' or '.join(WEIGHT_FILES)} is missing (only safetensors is read)")
    names = shards_named(index)
    if missing := [name for name in names if not (base / name).is_file()]:
        raise ModelError(f"{base}: {missing[0]} is missing, which the index names")
    return [base / name for name in names]


def shards_named(index: Path) -> list[str]:
    """The files that an index of shards names. Raises ModelError if it names none, or anything but safetensors files in
    its own directory."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index}: not a readable index of shards ({type(error).__name__}: {error})") from error
    if not names:
        raise ModelError(f"{index}: its weight_map is empty: it names no shards")
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ModelError(f"{index}: {name!r} is not a safetensors file in the same directory")
    return names


def check_doubled(path: Any, names: Iterable[str], before: Container[str]) -> None:
    """Raise ModelError if one of these tensors is also in another file of the model. before: tensors of other files."""
    if doubled := [name for name in names if name in before]:
        raise ModelError(f"{path}: {doubled[0]} is in another file of the model too; keep the one that is right")


def open_files(paths: Iterable[str], files: contextlib.ExitStack) -> dict[str, Any]:
    """{name: unread tensor} of all files, which `files` keeps open. Raises ModelError if a file is broken, or a tensor
    is in two files."""
    sources: dict[str, Any] = {}
    for path in paths:
        try:
            file = files.enter_context(safe_open(path, "pt"))
        except SafetensorError as error:
            raise ModelError(f"{path}: {error}; the file is broken or cut off") from error
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        check_doubled(path, slices, sources)
        sources |= slices
    return sources


def base_headers(base: Path) -> dict[Path, dict[str, TensorInfo]]:
    """{file: its header} of a model directory. Raises ModelError if a file is missing or truncated, or a tensor is in
    two files."""
    headers: dict[Path, dict[str, TensorInfo]] = {}
    seen: set[str] = set()
    for path in base_files(base):
        headers[path] = read_header(path)
        check_doubled(path, headers[path], seen)
        seen.update(headers[path])
    return headers


def _layout(infos: Mapping[str, TensorInfo]) -> tuple[list[str], bytes]:
    """The order of the tensors, widest types first so that all are aligned, and the file's header."""
    names = sorted(infos, key=lambda name: -DTYPES[infos[name].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + infos[name].nbytes
        header[name] = {"dtype": infos[name].dtype, "shape": infos[name].shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text


def file_size(infos: Mapping[str, TensorInfo]) -> int:
    """The size in bytes of the file that `write_tensors` writes."""
    return len(_layout(infos)[1]) + sum(info.nbytes for info in infos.values())


def write_tensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    blocks: Callable[[str], Iterable[torch.Tensor]],
    count: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write a safetensors file block by block and sync it; only one block is in memory at a time.

    blocks: a tensor's name -> its values, in consecutive pieces of any shape, in the dtype given in `infos`.
    count: called with the number of bytes of each piece written.
    """
    names, beginning = _layout(infos)
    with path.open("wb") as file:
        file.write(beginning)
        for name in names:
            start = file.tell()
            for block in blocks(name):
                assert CODES[block.dtype] == infos[name].dtype, name
                data: Any = block.contiguous().flatten().view(torch.uint8).numpy()
                file.write(data)
                count(block.nbytes)
            assert file.tell() - start == infos[name].nbytes, name
        file.flush()
        os.fsync(file.fileno())


def shard_names(count: int) -> list[str]:
    """The standard names of so many weight files."""
    if count == 1:
        return [WEIGHT_FILES[0]]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def split_by_size(sizes: Mapping[str, int], largest: int) -> list[list[str]]:
    """Names, in order, in groups of up to `largest` bytes together, each with at least one. sizes: {name: bytes}."""
    groups: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not groups or total + size > largest:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def write_index(directory: Path, files: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Write the index of a model's weight files, if there are several. files: {file name: its header}."""
    if len(files) > 1:
        weight_map = {name: file for file, infos in files.items() for name in infos}
        size = sum(info.nbytes for infos in files.values() for info in infos.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / WEIGHT_FILES[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """The `count` argument of `write_tensors`, for the joint progress of several files of `total` bytes."""
    return lambda nbytes: progress(nbytes, total) if progress else None


def row_blocks(tensor: torch.Tensor, elements: int = 1 << 20) -> Iterator[tuple[slice, torch.Tensor]]:
    """(slice of rows, tensor[rows]) in pieces of about `elements` numbers."""
    if tensor.ndim == 0:
        tensor = tensor.view(1)
    rows = max(1, elements // max(1, prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], rows):
        piece = slice(start, start + rows)
        yield piece, tensor[piece]


def check_output(out_dir: Path) -> None:
    """Raise ModelError if out_dir is a file or a directory that is not empty."""
    if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir())):
        raise ModelError(f"{out_dir} already exists and is not empty; choose another directory")


def check_space(out_dir: Path, needed: int) -> None:
    """Raise ModelError if the disk of out_dir has less than `needed` bytes free."""
    existing = next(parent for parent in out_dir.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ModelError(f"{out_dir} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free")


@contextlib.contextmanager
def whole_directory(out_dir: Path, replace: bool = False) -> Iterator[Path]:
    """Context manager that yields a temporary directory next to out_dir and renames it to out_dir if the block
    succeeds.

    If the block fails, the temporary directory is removed. If the process is killed, it stays, under a name that begins
    with a dot, until the next attempt removes it.

    replace: whether an existing out_dir is then replaced; otherwise it must not exist or be empty.

    Raises:
        ModelError: out_dir exists and is not empty, its disk is full, or it cannot be written.
    """
    out_dir = out_dir.absolute()
    if not replace:
        check_output(out_dir)
    temporary = out_dir.with_name(f".{out_dir.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        follow_umask(temporary)
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        if out_dir.is_dir():
            shutil.rmtree(out_dir)
        temporary.replace(out_dir)
        _sync(out_dir.parent)
    except Exception as error:  # safetensors and tokenizers raise various exceptions when they cannot write
        full = is_full(error, short=False)
        if not full and not isinstance(error, OSError):
            raise
        strerror = getattr(error, "strerror", None)
        reason = "the disk is full" if full else f"cannot be written ({strerror or error})"
        raise ModelError(f"{out_dir}: {reason}; nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Give the files in a new folder the mode according to the umask; safetensors creates files only its owner can
    read."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
