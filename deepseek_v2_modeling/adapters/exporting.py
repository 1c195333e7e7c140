"""Exports adapters to the layout that servers read: one 2-D pair of factors per expert and projection.

docs/adapters.md lists what servers support, and in which versions this was observed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open

from ..checkpoints.adapter_config import WEIGHTS
from ..checkpoints.hub_layout import Piece
from ..checkpoints.sources import MODEL_CARD, base_directory, copy_side_files
from ..checkpoints.stock_classes import stock_differences
from ..checkpoints.tensor_files import (
    DTYPES,
    Progress,
    TensorInfo,
    base_files,
    check_output,
    check_space,
    counter,
    file_size,
    read_header,
    whole_directory,
    write_tensors,
)
from ..errors import ModelError
from .files import AdapterFiles, FactorReader, open_adapter, open_factors
from .layouts import PREFIX, FactorPair, common_scaling, pad
from .lora import absolute_base


def peft_name(module: str, factor: str) -> str:
    """A tensor's name in PEFT's files."""
    return f"{PREFIX}{module}.{factor}"


# Layout -> (module, "lora_A.weight" or another factor) -> the name of its tensor.
LAYOUTS: dict[str, Callable[[str, str], str]] = {"per_expert": peft_name}

# Projections that servers stack into one: if one of them has a pair, each needs one.
STACKED = (("q_a_proj", "kv_a_proj_with_mqa"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
STACKED_EXPERTS = ("gate_proj", "up_proj", "down_proj")
VLLM_RANK = 16
# Last component of an adapted module's name -> a known limitation of servers (docs/adapters.md).
SERVER_NOTES = {
    "kv_b_proj": "vLLM applies kv_b_proj with VLLM_MLA_DISABLE=1 only: set it",
    "q_proj": "SGLang fails on q_proj without k_proj and v_proj, as of a model without q_lora_rank; use dsv2 merge",
    "gate": "SGLang does not support adapters on the router; use dsv2 merge",
    "embed_tokens": "vLLM refuses adapters on embed_tokens of DeepSeek-V2; use dsv2 merge",
    "lm_head": "vLLM refuses adapters on lm_head of DeepSeek-V2; use dsv2 merge",
}
WITHOUT = {"q_proj": "k_proj"}  # a limitation that holds only where the other has no pair


@dataclass(frozen=True)
class ExportReport:
    """The result of an export. zeros: number of added pairs of zeros, which servers need next to others. notes: known
    limitations of servers for this adapter. warnings: settings of its base that stock transformers computes
    differently."""

    pairs: int
    zeros: int
    rank: int
    nbytes: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ServedPair:
    """A pair of the result, on a hub tensor [out, in]. pair: the adapter's pair it is taken from, None for zeros."""

    module: str
    piece: Piece
    pair: FactorPair | None

    def names(self, layout: str) -> tuple[str, str]:
        """The names of its two factors in the file."""
        infix, ending = ("lora_embedding_", "") if self.embedding else ("lora_", ".weight")
        name = LAYOUTS[layout]
        return name(self.module, f"{infix}A{ending}"), name(self.module, f"{infix}B{ending}")

    @property
    def embedding(self) -> bool:
        return self.pair is not None and self.pair.embedding

    def factors(self, reader: FactorReader, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) as written to the file, with this rank and for this scaling."""
        rows, columns = self.piece.shape
        if self.pair is None:
            return torch.zeros(rank, columns), torch.zeros(rows, rank)
        down, up = reader.factors(self.pair)
        if self.piece.place is not None:
            down, up = down[self.piece.place[0]], up[self.piece.place]
        if self.pair.scaling != scaling:
            up = up.float() * (self.pair.scaling / scaling)
        down, up = pad(down.float(), rank, 0), pad(up.float(), rank, 1)
        return (up.T, down.T) if self.embedding else (down, up)


def export_adapter(
    adapter_dir: str | Path,
    out_dir: str | Path,
    layout: str = "per_expert",
    progress: Progress | None = None,
    model_card: str | None = None,
    kv_b: bool = False,
) -> ExportReport:
    """Write an adapter with one pair of factors per expert and projection, as vLLM and SGLang read it.

    All pairs are padded with zeros to one rank, which servers read from adapter_config.json; their products do not
    change (`common_scaling`). If the adapter has only some of the projections that servers stack, the others get zeros.

    Args:
        adapter_dir: an adapter in PEFT's layout, or a run with one in final/.
        layout: a name in LAYOUTS.
        progress: called with the bytes of each piece written, and the total.
        model_card: text of the README.md to write.
        kv_b: write the pairs on kv_b_proj too. Only for servers that apply them (`check_kv_b`).

    Raises:
        ModelError: there is no adapter or base, tensors do not match, the adapter has whole tensors of its own (a
            reward model's head, changed embeddings), it has pairs on kv_b_proj and kv_b is false, the layout is
            unknown, or out_dir is not empty.
    """
    out_dir = Path(out_dir)
    if layout not in LAYOUTS:
        raise ModelError(f'unknown layout "{layout}": use {", ".join(LAYOUTS)}')
    check_output(out_dir)
    adapter = open_adapter(adapter_dir)
    check_whole_tensors(adapter)
    if not kv_b:
        check_kv_b(adapter)
    rank, alpha = common_scaling((pair.rank, pair.scaling) for pair in adapter.pairs)
    served = plan_pairs(adapter)
    infos = {name: info for pair in served for name, info in _infos(pair, pair.names(layout), rank).items()}
    total = file_size(infos)
    check_space(out_dir, total)
    with whole_directory(out_dir) as directory, open_factors(adapter) as reader:
        homes = {name: (pair, side) for pair in served for side, name in enumerate(pair.names(layout))}
        _write_pairs(directory / WEIGHTS, homes, infos, reader, (rank, alpha / rank), counter(progress, total))
        _server_config(adapter, served, rank, alpha).save_pretrained(str(directory))
        copy_side_files(adapter.directory, None, directory)
        if model_card is not None:
            (directory / MODEL_CARD).write_text(model_card, encoding="utf-8")
    zeros = sum(pair.pair is None for pair in served)
    warnings = stock_differences(adapter.model_config)
    return ExportReport(len(served) - zeros, zeros, rank, total, server_notes(served, rank), warnings)


def check_whole_tensors(adapter: AdapterFiles) -> None:
    """Raise ModelError for whole tensors in the adapter, unless they equal the base's (PEFT saves its embeddings)."""
    if not adapter.replaced:
        return
    base = base_directory(adapter.base)
    places = {name: path for path in base_files(base) for name in read_header(path)}
    with open_factors(adapter) as reader:
        for name, stored in adapter.replaced.items():
            if name in places:
                tensor = reader.tensor(stored)
                with safe_open(places[name], "pt") as file:
                    if torch.equal(file.get_tensor(name).to(tensor.dtype), tensor):
                        continue
            raise ModelError(f"{adapter.directory}: servers do not read full tensors ({stored}); use: dsv2 merge")


def check_kv_b(adapter: AdapterFiles) -> None:
    """Raise ModelError for pairs on kv_b_proj: vLLM reads its weight in absorbed form, and so would serve another model
    without a word."""
    if any(pair.parameter.endswith(".kv_b_proj.weight") for pair in adapter.pairs):
        raise ModelError(
            f"{adapter.directory}: vLLM drops adapters on kv_b_proj under MLA without a word (vllm#48974); use: "
            "dsv2 merge; or, for a server that applies them (vLLM with VLLM_MLA_DISABLE=1, SGLang), add --kv-b"
        )


def plan_pairs(adapter: AdapterFiles) -> list[ServedPair]:
    """All pairs of the result, each on a tensor of the model."""
    pairs = {pair.parameter: pair for pair in adapter.pairs}
    modules = {name.removesuffix(".weight"): piece for name, piece in adapter.layout.items()}
    adapted = [m for m, piece in modules.items() if piece.parameter in pairs]
    served = dict.fromkeys(name for module in adapted for name in stacked_with(module) if name in modules)
    return [ServedPair(name, modules[name], pairs.get(modules[name].parameter)) for name in served]


def stacked_with(module: str) -> list[str]:
    """The modules that servers stack with this one, including itself."""
    stem, _, last = module.rpartition(".")
    if stem.rpartition(".")[0].endswith(".experts"):
        return [f"{stem}.{name}" for name in STACKED_EXPERTS]
    return [f"{stem}.{name}" if stem else name for group in (*STACKED, (last,)) if last in group for name in group]


def _infos(pair: ServedPair, names: tuple[str, str], rank: int) -> dict[str, TensorInfo]:
    (rows, columns), (a, b) = pair.piece.shape, names
    shapes = ((rank, rows), (columns, rank)) if pair.embedding else ((rank, columns), (rows, rank))
    return {a: TensorInfo("F32", shapes[0]), b: TensorInfo("F32", shapes[1])}


def _write_pairs(
    path: Path,
    homes: Mapping[str, tuple[ServedPair, int]],
    infos: Mapping[str, TensorInfo],
    reader: FactorReader,
    rank_and_scaling: tuple[int, float],
    count: Callable[[int], None],
) -> None:
    """Write the file of factors. homes: tensor -> its pair, and 0 for A or 1 for B. wanted: (rank, scaling)."""

    def blocks(name: str) -> Iterator[torch.Tensor]:
        pair, side = homes[name]
        tensor = pair.factors(reader, *rank_and_scaling)[side]
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{reader.adapter.directory}: the factors of {pair.module} are not all finite")
        yield tensor.to(DTYPES[infos[name].dtype])

    write_tensors(path, infos, blocks, count)


def _server_config(adapter: AdapterFiles, served: Iterable[ServedPair], rank: int, alpha: int) -> LoraConfig:
    """The config for servers: last name components as targets, one rank and alpha, and no use_rslora, which SGLang does
    not read."""
    return LoraConfig(
        base_model_name_or_path=absolute_base(adapter.base),
        task_type=adapter.config.get("task_type"),
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted({pair.module.rpartition(".")[2] for pair in served}),
    )


def server_notes(served: Iterable[ServedPair], rank: int) -> tuple[str, ...]:
    """Notes for whoever serves the adapter."""
    adapted = {pair.module.rpartition(".")[2] for pair in served if pair.pair is not None}
    present = {pair.module.rpartition(".")[2] for pair in served}
    notes = [note for name, note in SERVER_NOTES.items() if name in adapted and WITHOUT.get(name) not in present]
    if rank > VLLM_RANK:
        notes.append(f"vLLM needs --max-lora-rank {rank} or more (its default is {VLLM_RANK})")
    return tuple(notes)
