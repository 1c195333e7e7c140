"""samples.jsonl of a stage that generates answers; each answer is written as soon as it is generated.

Each process appends to its own file; a killed run resumes with the answers in these files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations.run_files import SAMPLES
from deepseek_v2_modeling.training import cut_file, read_lines, write_lines

Sample = dict[str, Any]
Place = tuple[Any, ...]


@dataclass(frozen=True)
class SampleFiles:
    """The sample files of a run. keys: the keys whose values identify a sample."""

    run_dir: Path
    keys: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The first process's file, into which all samples are merged at the end."""
        return self.run_dir / SAMPLES

    def of_process(self, process: int) -> Path:
        """The file that this process appends to."""
        return self.path if process == 0 else self.path.with_name(f"{self.path.stem}.{process}{self.path.suffix}")

    def place(self, sample: Mapping[str, Any]) -> Place:
        """The values of `keys`, which identify the sample."""
        return tuple(sample[key] for key in self.keys)

    def gather(self) -> None:
        """Merge the samples of all processes into samples.jsonl, without duplicates."""
        samples = [sample for part in (self.path, *self._parts()) for sample in read_lines(part)]
        valid = (sample for sample in samples if set(self.keys) <= sample.keys())
        write_lines(self.path, {self.place(sample): sample for sample in valid}.values())
        self.remove_parts()

    def kept(self) -> dict[Place, Sample]:
        """The samples in samples.jsonl, by their place."""
        return {self.place(sample): sample for sample in read_lines(self.path)}

    def open(self, state: Any, resume: bool) -> dict[Place, Sample]:
        """The samples to resume with, the same in all processes. Without `resume` all old samples are deleted.

        state: accelerate's PartialState.
        """
        if state.is_main_process:
            if resume:
                self.gather()
            else:
                cut_file(self.path, 0)
                self.remove_parts()
        state.wait_for_everyone()
        kept = self.kept()
        state.wait_for_everyone()  # the first process must not append while the others still read
        return kept

    def remove_parts(self) -> None:
        """Delete the files of all processes except the first."""
        for part in self._parts():
            part.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return sorted(self.run_dir.glob(f"{self.path.stem}.*{self.path.suffix}"))
