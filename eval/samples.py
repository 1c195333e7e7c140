"""samples.jsonl of an evaluation: the model's answers, written as soon as they are generated.

Each process appends to its own file; a killed evaluation resumes with the answers in them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conversations.run_files import SAMPLES
from deepseek_v2_modeling.training import read_lines, write_lines

Sample = dict[str, Any]
Place = tuple[str, str, int]  # task, way of decoding, number of the row


def place_of(sample: Mapping[str, Any]) -> Place:
    """Which answer a sample is; there is one for each place."""
    return sample["task"], sample["decoding"], sample["row"]


def file_of(run_dir: Path, process: int) -> Path:
    """The file that a process appends to; the first one's is the result."""
    path = run_dir / SAMPLES
    return path if process == 0 else path.with_name(f"{path.stem}.{process}{path.suffix}")


def gather_samples(run_dir: Path) -> None:
    """Merge the samples from all processes of a killed evaluation into samples.jsonl, without duplicates."""
    parts = [run_dir / SAMPLES, *_parts(run_dir)]
    samples = [sample for part in parts for sample in read_lines(part) if {"task", "decoding", "row"} <= sample.keys()]
    write_lines(run_dir / SAMPLES, {place_of(sample): sample for sample in samples}.values())
    remove_parts(run_dir)


def remove_parts(run_dir: Path) -> None:
    """Remove the files of all processes but the first."""
    for part in _parts(run_dir):
        part.unlink(missing_ok=True)


def kept_samples(run_dir: Path) -> dict[Place, Sample]:
    """The samples in samples.jsonl, by their place."""
    return {place_of(sample): sample for sample in read_lines(run_dir / SAMPLES)}


def finish_task(run_dir: Path, task: str, samples: Sequence[Sample]) -> None:
    """Puts the samples of a task, in their order, in place of what its processes wrote, behind those of other tasks."""
    path = run_dir / SAMPLES
    write_lines(path, [*(sample for sample in read_lines(path) if sample.get("task") != task), *samples])


def _parts(run_dir: Path) -> list[Path]:
    path = run_dir / SAMPLES
    return sorted(run_dir.glob(f"{path.stem}.*{path.suffix}"))
