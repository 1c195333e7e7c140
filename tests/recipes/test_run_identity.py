"""What a run began with and what it has cost: large files by pieces, seconds of a run that was killed."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from conversations.errors import ToolkitError
from recipes.runs import identity
from recipes.runs.identity import check_same_start
from recipes.runs.manifest import seconds_so_far


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 2,000 bytes, which is a large one here: read at 0, 512, 1024, 1536 and its end, 100 bytes each."""
    for name, value in (("WHOLE", 1000), ("PIECE", 100), ("STRIDE", 512)):
        monkeypatch.setattr(identity, name, value)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(2000))
    return file


@pytest.mark.parametrize("at", [0, 99, 512, 611, 1024, 1536, 1900, 1999])
def test_a_large_file_is_another_one_when_a_piece_of_it_is(weights: Path, at: int) -> None:
    before = identity._content(weights)
    assert identity._content(weights) == before
    changed = bytearray(weights.read_bytes())
    changed[at] = 1
    weights.write_bytes(changed)
    assert identity._content(weights) != before


@pytest.mark.parametrize("size", [1999, 2001, 2512])
def test_a_large_file_is_another_one_when_it_is_longer_or_shorter(weights: Path, size: int) -> None:
    before = identity._content(weights)
    weights.write_bytes(bytes(size))
    assert identity._content(weights) != before


@pytest.mark.parametrize("at", [0, 500, 999])
def test_a_small_file_is_read_whole(weights: Path, at: int) -> None:
    weights.write_bytes(bytes(1000))
    before = identity._content(weights)
    weights.write_bytes(bytes(at) + b"x" + bytes(999 - at))
    assert identity._content(weights) != before


def test_a_config_is_the_same_in_another_order(tmp_path: Path) -> None:
    """As another version of a library may write it, with its own name in it."""
    config, hashes = tmp_path / "config.json", []
    for text in (
        '{"a": 1, "b": {"c": 2, "d": 3}}',
        '{"transformers_version": "5.0", "b": {"d": 3, "c": 2}, "a": 1}',
        '{"a": 1, "b": {"c": 2, "d": 4}}',
    ):
        config.write_text(text)
        hashes.append(identity._model(str(tmp_path)))
    assert hashes[0] == hashes[1] != hashes[2]


def start(processes: int = 2, batch: int = 8, **files: str) -> dict[str, Any]:
    parts = {part: {"path": f"at/{part}", "sha256": content} for part, content in files.items()}
    return {"processes": processes, "global batch": batch, "files": parts}


def test_a_run_goes_on_with_what_it_began_with() -> None:
    check_same_start(Path("run"), start(model="a", tokenizer="b"), start(model="a", tokenizer="b"))
    check_same_start(Path("run"), {"processes": 2}, start(model="a"))  # of a toolkit that did not look
    check_same_start(Path("run"), start(model="a"), {**start(), "files": {}})  # a process that does not
    merged = {identity.MERGED: "m"}
    check_same_start(Path("run"), start(model="a", **merged), start(model="a"))  # not merged again yet
    evaluation = {"files": start(model="a")["files"]}
    check_same_start(Path("run"), {"processes": 2, **evaluation}, evaluation)  # any number of processes


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (start(3, 12, model="a", tokenizer="b"), r"began with 2 processes \(global batch 8\) and there are 3 now"),
        (start(model="c", tokenizer="b"), r"the model \(at/model\) has changed since the run began; put"),
        (start(model="c", tokenizer="d"), r"the model \(at/model\) has changed .*and so have: tokenizer; put"),
        (start(model="a"), r"the tokenizer \(at/tokenizer\) has changed since the run began"),
        (start(model="a", tokenizer="b", adapter="c"), r"the adapter \(at/adapter\) has changed since the run began"),
    ],
)
def test_a_run_does_not_go_on_with_anything_else(now: dict[str, Any], words: str) -> None:
    with pytest.raises(ToolkitError, match=words):
        check_same_start(Path("run"), start(model="a", tokenizer="b"), now)


def test_another_merged_base_is_another_start() -> None:
    before, now = (start(model="a", **{identity.MERGED: content}) for content in "mn")
    with pytest.raises(ToolkitError, match="the merged base model"):
        check_same_start(Path("run"), before, now)


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@pytest.mark.parametrize(
    ("manifest", "seconds"),
    [
        ({}, 0.0),
        ({"status": "finished", "seconds": 7.5, "started": stamp(1000)}, 7.5),
        ({"status": "running", "seconds": 0.0, "started": stamp(1000)}, 60.0),
        ({"status": "running", "seconds": 7.5, "started": stamp(1000)}, 67.5),
        ({"status": "running", "seconds": 7.5, "started": stamp(0), "resumed": [{"at": stamp(1020)}]}, 47.5),
        ({"status": "running", "seconds": 1.0, "resumed": [{"at": stamp(0)}, {"at": stamp(1050)}]}, 11.0),
        ({"status": "running", "seconds": 7.5, "started": stamp(2000)}, 7.5),  # nothing was written since
        ({"status": "running", "seconds": "x", "started": "yesterday"}, 0.0),
        ({"status": "running", "seconds": 2.0, "resumed": [{}]}, 2.0),
    ],
)
def test_a_killed_run_has_cost_what_it_worked(tmp_path: Path, manifest: dict[str, Any], seconds: float) -> None:
    """To the last thing that it wrote, at 1,060 here."""
    for name, time in (("recipe.yaml", 1000), ("metrics.jsonl", 1060), ("notes.txt", 5000)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time, time))
    assert seconds_so_far(tmp_path, manifest) == pytest.approx(seconds)


def test_seconds_of_a_run_without_files(tmp_path: Path) -> None:
    assert seconds_so_far(tmp_path, {"status": "running", "seconds": 3.0, "started": stamp(1000)}) == 3.0
