"""`dsv2 merge`, `dsv2 export` and `dsv2 import`: converting adapters."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from conversations.errors import ToolkitError
from deepseek_v2_modeling.adapters import CONFIG, Progress, export_adapter, import_adapter, merge_lora
from deepseek_v2_modeling.loading import resolve_source, stock_differences
from deepseek_v2_modeling.training import has_shards, plain_checkpoint, quiet_libraries, write_plain
from recipes.lock import hold_path
from recipes.runs.foundation import kind_of
from recipes.runs.model_card import card_text


@contextmanager
def _bar(command: str) -> Iterator[Progress]:
    """A progress bar of the bytes written; none if the output is not a terminal."""
    from tqdm import tqdm

    quiet_libraries()
    with tqdm(
        desc=command, unit="B", unit_scale=True, disable=None, file=sys.__stderr__, leave=False, dynamic_ncols=True
    ) as bar:

        def advance(nbytes: int, total: int) -> None:
            bar.total = total
            bar.update(nbytes)

        yield advance


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _warnings(differences: Iterable[str]) -> list[str]:
    """Warnings about programs that run stock's class: those without this package, and `transformers serve`."""
    return [f"warning: {text}; load it with deepseek_v2_modeling, or check its answers" for text in differences]


def _card(arguments: argparse.Namespace, plain: str | Path, adapter: bool) -> str:
    """The model card of the result, from what is recorded beside the adapter or the run. plain: its files."""
    source = resolve_source(plain)
    return card_text(
        arguments.adapter,
        name=arguments.out_dir.resolve().name,
        adapter=adapter,
        base=source.base if source.adapter or plain == arguments.adapter else str(arguments.adapter),
        scores=kind_of(source) == "score",
        license=arguments.license,
        warnings=stock_differences(source.settings),
    )


@contextmanager
def _plain(arguments: argparse.Namespace) -> Iterator[str | Path]:
    """Context manager that locks OUT_DIR and yields the adapter or model; a checkpoint in parts as a plain one."""
    with hold_path(arguments.out_dir), plain_checkpoint(arguments.adapter, arguments.out_dir) as plain:
        yield plain


def merge(arguments: argparse.Namespace) -> str:
    with _plain(arguments) as plain, _bar("merge") as progress:
        card = _card(arguments, plain, adapter=False)
        report = merge_lora(plain, arguments.out_dir, arguments.dtype, progress, card, arguments.shard_size)
    files = "1 file" if report.shards == 1 else f"{report.shards} files"
    adapted = f"{report.adapted} adapted" if report.adapted else "copied from a full model, which has no adapter"
    phrases = [f"{report.tensors} tensors in {files}, {_size(report.nbytes)}, {adapted}"]
    phrases += [f"{report.replaced} the adapter's own"] * bool(report.replaced)
    phrases += [f"without the base's {', '.join(report.left_out)}"] * bool(report.left_out)
    return "\n".join([f"{arguments.out_dir}: {', '.join(phrases)}", *_warnings(report.warnings)])


def export(arguments: argparse.Namespace) -> str:
    with _plain(arguments) as plain, _bar("export") as progress:
        card = _card(arguments, plain, adapter=True)
        report = export_adapter(plain, arguments.out_dir, arguments.layout, progress, card, arguments.kv_b)
    zeros = f" and {report.zeros} of zeros" if report.zeros else ""
    lines = [f"{arguments.out_dir}: {report.pairs} pairs{zeros}, rank {report.rank}, {_size(report.nbytes)}"]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes), *_warnings(report.warnings)])


def import_(arguments: argparse.Namespace) -> str:
    if has_shards(Path(arguments.adapter)):
        return _import_parts(arguments)
    with hold_path(arguments.out_dir), _bar("import") as progress:
        report = import_adapter(arguments.adapter, arguments.out_dir, arguments.base, progress)
    zeros = f", {report.zeros} weights without a pair got zeros" if report.zeros else ""
    return f"{arguments.out_dir}: {report.tensors} tensors from {report.layout}, {_size(report.nbytes)}{zeros}"


def _import_parts(arguments: argparse.Namespace) -> str:
    if not (Path(arguments.adapter) / CONFIG).is_file():
        raise ToolkitError(f"{arguments.adapter}: not an adapter; write the model by: dsv2 merge CHECKPOINT OUT_DIR")
    if arguments.base is not None:
        raise ToolkitError("--base: a checkpoint's adapter is on the base of its run; leave it out")
    with hold_path(arguments.out_dir):
        infos = write_plain(Path(arguments.adapter), arguments.out_dir)
    nbytes = sum(info.nbytes for info in infos.values())
    return f"{arguments.out_dir}: {len(infos)} tensors from a checkpoint in parts, {_size(nbytes)}"
