"""Merges an adapter into its base on disk, file by file, into a plain checkpoint in the hub's layout.

For a full model the result is a copy, optionally in another dtype.

First everything is planned and checked from the files' headers, then each shard of the base is streamed to its merged
counterpart in pieces of a few megabytes. No model is created, and memory does not grow with the checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoints.finite import check_finite, is_finite
from ..checkpoints.hub_layout import hub_layout, without_extra_layers
from ..checkpoints.lazy_tensors import BlockScaled
from ..checkpoints.sources import MODEL_CARD, base_directory, copy_side_files, resolve_source
from ..checkpoints.stock_classes import stock_differences
from ..checkpoints.tensor_files import (
    CODES,
    DTYPES,
    Progress,
    base_headers,
    check_output,
    check_space,
    counter,
    file_size,
    row_blocks,
    whole_directory,
    write_index,
    write_tensors,
)
from ..errors import ModelError
from ..model_classes import model_class
from ..outline import meta_model
from .files import AdapterFiles, FactorReader, adapter_files, open_factors, with_labels
from .loading import shapes_of
from .merge_plan import Merged, Shard, plan_shards


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge. adapted: number of tensors changed by factors; replaced: number of tensors taken from the
    adapter; nbytes: total size; left_out: tensors of the base that the result does not have; warnings: settings that
    stock transformers computes differently."""

    shards: int
    tensors: int
    adapted: int
    replaced: int
    nbytes: int
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def merge_lora(
    adapter_dir: str | Path,
    out_dir: str | Path,
    dtype: str | None = None,
    progress: Progress | None = None,
    model_card: str | None = None,
    shard_size: int | None = None,
) -> MergeReport:
    """Write the base with the adapter merged into it, as a plain checkpoint in the hub's layout.

    out_dir is created atomically, with tokenizer, chat template, generation config, and a config.json that has both
    forms of the RoPE settings.

    Args:
        adapter_dir: an adapter in PEFT's layout, or a run with one in final/; its config names the base. A full model,
            or a run that trained one, is checked and copied.
        dtype: "float32", "bfloat16" or "float16" for all weights; None keeps each tensor's dtype, with bfloat16 for
            fp8. Sums are computed in float32.
        progress: called with the bytes of each piece written, and the total.
        model_card: text of the README.md to write.
        shard_size: the largest size in bytes of the tensors of a weight file (a larger tensor gets a file of its own);
            None keeps the base's files.

    Raises:
        ModelError: there is no adapter, base or model, tensors do not match, weights are quantised, numbers are not
            finite, out_dir is not empty, the disk has too little space, or dtype or shard_size is impossible.
    """
    out_dir = Path(out_dir)
    check_output(out_dir)
    adapter = open_source(adapter_dir)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ModelError(f'dtype "{dtype}" is not one of float32, bfloat16, float16')
    if shard_size is not None and shard_size < 1:
        raise ModelError(f"shard_size is {shard_size}: it must be at least 1 byte")
    base = base_directory(adapter.base)
    shards, left_out = plan_shards(adapter, base, CODES[getattr(torch, dtype)] if dtype else None, shard_size)
    total = sum(file_size(shard.infos) for shard in shards)
    check_space(out_dir, total + (64 << 20))
    with whole_directory(out_dir) as directory, open_factors(adapter) as reader:
        _write_shards(directory, shards, reader, counter(progress, total))
        write_config(adapter, directory, dtype)
        copy_side_files(adapter.directory, base, directory)
        if model_card is not None:
            (directory / MODEL_CARD).write_text(model_card, encoding="utf-8")
    merged = [tensor for shard in shards for tensor in shard.tensors.values()]
    return MergeReport(
        shards=len(shards),
        tensors=len(merged),
        adapted=sum(tensor.pair is not None for tensor in merged),
        replaced=sum(tensor.from_adapter for tensor in merged),
        nbytes=total,
        left_out=left_out,
        warnings=stock_differences(adapter.model_config),
    )


def open_source(path: str | Path) -> AdapterFiles:
    """An adapter or a full model, described by its headers. Raises ModelError like `open_adapter`."""
    model = resolve_source(path)
    if model.adapter is not None:
        return adapter_files(model.adapter, model, path)
    settings = model.settings
    infos = {name: info for header in base_headers(Path(model.base)).values() for name, info in header.items()}
    head = "score" if any("SequenceClassification" in name for name in settings.architectures or ()) else "causal_lm"
    settings = with_labels(settings, infos)
    parameters = shapes_of(meta_model(settings, head).state_dict())
    return AdapterFiles(
        directory=Path(model.base),
        base=model.base,
        config={},
        model_config=settings,
        head=head,
        pairs=(),
        replaced={},
        infos={},
        parameters=parameters,
        layout=hub_layout(parameters),
        transposed=False,
    )


# --- Writing -----------------------------------------------------------------------------------------------------


def _write_shards(directory: Path, shards: list[Shard], reader: FactorReader, count: Callable[[int], None]) -> None:
    for shard in shards:
        with ExitStack() as stack:
            files: Any = {path: stack.enter_context(safe_open(path, "pt")) for path in shard.sources}
            write_tensors(
                directory / shard.name,
                shard.infos,
                lambda name, shard=shard, files=files: merged_blocks(name, shard.tensors[name], files, reader),
                count,
            )
    write_index(directory, {shard.name: shard.infos for shard in shards})


def merged_blocks(name: str, merged: Merged, files: Mapping[Path, Any], reader: FactorReader) -> Iterator[torch.Tensor]:
    """A tensor of the result in blocks of rows: W + scaling * up @ down, summed in float32.

    files: the opened files of the base that the shard's tensors come from.

    Raises:
        ModelError: a weight, or a sum in the result's dtype, is not finite.
    """
    source = reader.tensor(merged.source) if merged.from_adapter else base_tensor(merged, files[merged.file])
    weight = source[merged.place]
    dtype = DTYPES[merged.info.dtype]
    source_dir = reader.adapter.directory if merged.from_adapter else reader.adapter.base
    if merged.pair is None and weight.dtype == dtype:
        yield from (check_finite(name, block, source_dir) for _, block in row_blocks(weight))
        return
    factors = None
    if merged.pair is not None:
        down, up = reader.factors(merged.pair)
        place = reader.adapter.layout[name].place
        if place is not None:
            down, up = down[place[0]], up[place]
        factors = merged.pair.scaling * down.float(), up
    for rows, block in row_blocks(weight):
        check_finite(name, block, source_dir)
        if factors is not None:
            block = torch.addmm(block.float(), factors[1][rows].float(), factors[0])
        block = block.to(dtype)
        if not is_finite(block):
            raise ModelError(f"{name}: the merged weights are not all finite in {str(dtype).removeprefix('torch.')}")
        yield block


def base_tensor(merged: Merged, file: Any) -> torch.Tensor:
    """A tensor of the base, in float32 if it is stored as fp8."""
    if merged.scales is None:
        return file.get_tensor(merged.source)
    path, name = merged.scales
    with safe_open(path, "pt") as scales:
        return BlockScaled(file.get_slice(merged.source), scales.get_slice(name))[...]


def write_config(adapter: AdapterFiles, directory: Path, dtype: str | None) -> None:
    """Write config.json with both forms of the RoPE settings and without references to code that is not copied."""
    config: Any = adapter.model_config
    config.architectures = [model_class(config, adapter.head).__name__]
    without_extra_layers(config)
    if dtype is not None:
        config.dtype = getattr(torch, dtype)
    if adapter.head == "score" and config.pad_token_id is None:
        config.pad_token_id = _pad_token_id(adapter)
    config.save_pretrained(directory)


def _pad_token_id(adapter: AdapterFiles) -> int | None:
    """The tokenizer's padding id, which stock's classifier needs for batches; the config of a reward model's base lacks
    it."""
    from transformers import AutoTokenizer

    for directory in (adapter.directory, Path(adapter.base)):
        if (directory / "tokenizer_config.json").is_file():
            tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            return tokenizer.pad_token_id
    return None
