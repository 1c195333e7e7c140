"""Checkpoints that several processes wrote in parts (`sharded.py`) as plain adapters and models, for merging and
exporting. One tensor is in memory at a time, and no process group is needed.
"""

import json
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from ..adapters.files import meta_adapter, read_plain_lora, with_labels
from ..adapters.layouts import hub_name
from ..checkpoints.adapter_config import CONFIG, WEIGHTS, is_adapter
from ..checkpoints.finite import check_finite
from ..checkpoints.hub_layout import hub_layout
from ..checkpoints.sources import (
    SHARDS,
    SIDE_FILES,
    TASKS,
    AdapterSource,
    base_directory,
    read_model_config,
    read_object,
)
from ..checkpoints.tensor_files import (
    TensorInfo,
    base_headers,
    check_output,
    check_space,
    shard_names,
    split_by_size,
    whole_directory,
    write_index,
    write_tensors,
)
from ..configuration import CORRECTION_BIAS
from ..errors import ModelError
from ..outline import meta_model
from .checksums import damage
from .sharded import WEIGHT, has_shards, name_on_disk, read_parts

AS_FINAL = {"dtype": "float32", "use_cache": True}  # the Trainer has turned the cache off
FILE_BYTES = 50 * 10**9  # of tensors in a weight file, as transformers' save_pretrained divides them


@contextmanager
def plain_checkpoint(path: str | Path, beside: Path) -> Iterator[str | Path]:
    """Context manager that yields a plain directory of a checkpoint in parts, which is removed afterwards, or any other
    path unchanged. beside: where the result will be written; the directory is on the same disk.

    Raises:
        ModelError: `beside` exists and is not empty, a part is missing, numbers are not finite, or the disk has too
            little space.
    """
    if not has_shards(Path(path)):
        yield path
        return
    check_output(beside)
    plain = beside.absolute().with_name(f".{beside.name}.whole")
    shutil.rmtree(plain, ignore_errors=True)  # of a process that was killed
    try:
        write_plain(Path(path), plain)
        yield plain
    finally:
        shutil.rmtree(plain, ignore_errors=True)


def write_plain(folder: Path, out_dir: Path) -> dict[str, TensorInfo]:
    """Write a checkpoint in parts as an adapter in PEFT's layout or a model in the hub's, both in float32, atomically.

    Returns:
        {tensor: dtype and shape} as written.

    Raises:
        ModelError: as `plain_checkpoint`, or out_dir is not empty.
    """
    infos = _infos(folder)
    check_space(out_dir, sum(info.nbytes for info in infos.values()) + (64 << 20))
    with whole_directory(out_dir) as directory:
        for name in ("config.json", CONFIG, *SIDE_FILES):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, directory / name)
        return (_write_adapter if is_adapter(folder) else _write_model)(folder, infos, directory)


def _infos(folder: Path) -> dict[str, TensorInfo]:
    """{parameter: dtype and shape} of the weights. Raises ModelError if a file is missing or cut short."""
    if fault := damage(folder, thorough=False):
        raise ModelError(f"{folder}: {fault}; put it back, or take another checkpoint")
    metadata = HuggingFaceStorageReader(str(folder / SHARDS)).read_metadata().state_dict_metadata
    entries: dict[str, Any] = {name: entry for name, entry in metadata.items() if name.startswith(WEIGHT)}
    return {n.removeprefix(WEIGHT): TensorInfo.of(entry.properties.dtype, entry.size) for n, entry in entries.items()}


def _read(folder: Path, name: str, info: TensorInfo) -> torch.Tensor:
    return check_finite(name, read_parts(folder, name, info), folder)


def _write_adapter(folder: Path, infos: Mapping[str, TensorInfo], directory: Path) -> dict[str, TensorInfo]:
    base = read_object(folder / CONFIG)["base_model_name_or_path"]
    infos = {name: infos[name] for name in infos.keys() - _biases_of_base(folder, infos, base)}
    names = {name_on_disk(name): name for name in infos}
    of_base = _from_base(folder, {name: infos[own].shape for name, own in names.items()}, base)
    written = {name: infos[own] for name, own in names.items()}
    written |= {name: TensorInfo.of(tensor.dtype, tensor.shape) for name, tensor in of_base.items()}
    write_tensors(
        directory / WEIGHTS,
        written,
        lambda name: [of_base[name] if name in of_base else _read(folder, names[name], infos[names[name]])],
    )
    return written


def _biases_of_base(folder: Path, infos: Mapping[str, TensorInfo], base: str) -> set[str]:
    """The routers' biases, unless training has moved them: then the adapter's file has them."""
    biases = {hub_name(name): name for name in infos if name.endswith(CORRECTION_BIAS)}
    before = _tensors(base, biases)
    moved = any(not torch.equal(_read(folder, biases[name], infos[biases[name]]), before[name]) for name in biases)
    return set() if moved else set(biases.values())


def _from_base(folder: Path, shapes: Mapping[str, tuple[int, ...]], base: str) -> dict[str, torch.Tensor]:
    """The embeddings and the head of the base, which PEFT saves beside adapters on them."""
    config = read_object(folder / CONFIG)
    head = "score" if config.get("task_type") == TASKS["score"] else "causal_lm"
    header = {name: TensorInfo("F32", shape) for name, shape in shapes.items()}
    source = AdapterSource(folder, config, base, head, folder / WEIGHTS, header)
    settings = with_labels(read_model_config(base), header)
    _, expected = meta_adapter(meta_model(settings, head), read_plain_lora(source))
    missing = {hub_name(name): name for name in expected.keys() - shapes.keys()}
    return {missing[name]: tensor for name, tensor in _tensors(base, missing).items()}


def _tensors(base: str, names: Container[str]) -> dict[str, torch.Tensor]:
    """{name: tensor} of those that a model directory or hub name has."""
    found = {}
    for path, infos in base_headers(base_directory(base)).items() if names else ():
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in infos if name in names}
    return found


def _write_model(folder: Path, infos: Mapping[str, TensorInfo], directory: Path) -> dict[str, TensorInfo]:
    layout = hub_layout({name: info.shape for name, info in infos.items()})
    written = {name: TensorInfo(infos[piece.parameter].dtype, piece.shape) for name, piece in layout.items()}
    latest: dict[str, torch.Tensor] = {}  # the experts of a layer are read once

    def blocks(name: str) -> list[torch.Tensor]:
        piece = layout[name]
        if piece.parameter not in latest:
            latest.clear()
            latest[piece.parameter] = _read(folder, piece.parameter, infos[piece.parameter])
        return [latest[piece.parameter][... if piece.place is None else piece.place]]

    groups = split_by_size({name: info.nbytes for name, info in written.items()}, FILE_BYTES)
    files = {
        file: {name: written[name] for name in names}
        for file, names in zip(shard_names(len(groups)), groups, strict=True)
    }
    for file, header in files.items():
        write_tensors(directory / file, header, blocks)
    write_index(directory, files)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps({**config, **AS_FINAL}, indent=2) + "\n", encoding="utf-8")
    return written
