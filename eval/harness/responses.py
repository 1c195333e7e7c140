"""What the model has answered so far, by what it was asked: a killed evaluation asks nothing twice.

Each process appends to a file of its own as soon as an answer is there, and reads those of all at the start. The files
are removed when the evaluation has finished: samples.jsonl then holds every answer.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversations.run_files import SAMPLES
from deepseek_v2_modeling.training import append_lines, read_lines

_STEM = f"{Path(SAMPLES).stem}_raw"  # begins like samples.jsonl: a run with either has begun


def key_of(*parts: Any) -> str:
    """A hash of everything that an answer depends on besides the model."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


class Responses:
    """The responses of an evaluation.

    Args:
        state: accelerate's PartialState.
        resume: keep what an interrupted evaluation has left; otherwise it is deleted.
    """

    def __init__(self, run_dir: Path, state: Any, resume: bool):
        self.run_dir, self.state = run_dir, state
        if state.is_main_process and not resume:
            self.remove()
        state.wait_for_everyone()
        stored = [line for path in self._files() for line in read_lines(path) if "key" in line]
        self.kept = {line["key"]: line["response"] for line in stored}
        state.wait_for_everyone()  # no process may append while others still read

    def add(self, responses: Mapping[str, Any]) -> None:
        """Store responses (JSON) by their keys."""
        self.kept.update(responses)
        lines = ({"key": key, "response": response} for key, response in responses.items())
        append_lines(self._file(self.state.process_index), lines)

    def remove(self) -> None:
        """Delete the files of all processes."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _file(self, process: int) -> Path:
        return self.run_dir / (f"{_STEM}.jsonl" if process == 0 else f"{_STEM}.{process}.jsonl")

    def _files(self) -> list[Path]:
        return sorted(self.run_dir.glob(f"{_STEM}*.jsonl"))
