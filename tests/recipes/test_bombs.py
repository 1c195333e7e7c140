"""Packed data and patterns of a recipe that would take all memory, disk or time: refused, and the bound is named."""

import gzip
import re
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from conversations import load_conversations
from conversations.answers.rules import verify
from conversations.errors import ToolkitError
from conversations.reading import data_file
from recipes.recipe.schema import validate

SMALL = 1 << 16


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bounds at a thousandth of their size."""
    monkeypatch.setattr(data_file, "ALWAYS_ALLOWED", SMALL)
    monkeypatch.setattr("conversations.reading.table_files.LONGEST_ROW", SMALL // 4)


def refused(path: Path) -> str:
    with pytest.raises(ToolkitError) as error:
        list(load_conversations(path))
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\n"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n'),
        ("a.json", b" "),
        ("a.csv", b"prompt,completion\n"),
        ("a.parquet", b"\0"),
        ("a.arrow", b"\0"),
    ],
)
@pytest.mark.parametrize("packing", ["gz", "zst", "zip"])
def test_what_unpacks_without_end_is_refused(
    name: str, content: bytes, packing: str, tmp_path: Path, small_bounds: None
) -> None:
    data = content * (SMALL * 8 // len(content))
    path = tmp_path / (f"{name}.{packing}" if packing != "zip" else "a.zip")
    if packing == "gz":
        path.write_bytes(gzip.compress(data))
    elif packing == "zst":
        path.write_bytes(pa.compress(data, "zstd", asbytes=True))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, data)
    assert path.stat().st_size * data_file.LARGEST_RATIO < len(data)
    assert "unpacks to more than" in refused(path) and f"{SMALL:,}" in refused(path)


def repeated(text: str, rows: int) -> pa.Table:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    return pa.table({"prompt": column, "completion": pa.array(["b"] * rows)})


def test_a_dictionary_of_one_long_value_is_not_written_out_for_every_row(tmp_path: Path, small_bounds: None) -> None:
    parquet.write_table(repeated("a" * (SMALL // 8), 5000), tmp_path / "a.parquet", compression="zstd")
    assert "unpacks to more than" in refused(tmp_path / "a.parquet")


def test_a_parquet_file_that_says_that_it_unpacks_to_much_is_not_unpacked(tmp_path: Path, small_bounds: None) -> None:
    table = pa.table({"prompt": ["a" * SMALL * 20], "completion": ["b"]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert "unpacks to more than" in refused(tmp_path / "a.parquet")


def test_a_parquet_file_with_more_rows_than_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversations.reading.table_files._ROWS_ALLOWED", 1000)
    parquet.write_table(repeated("a", 100_000), tmp_path / "a.parquet", compression="zstd")
    assert re.search(r"has 100,000 rows in [\d,]+ bytes", refused(tmp_path / "a.parquet"))


def test_a_row_of_a_table_has_the_bound_of_every_row(tmp_path: Path, small_bounds: None) -> None:
    texts = ["a", "a" * SMALL, "b"]
    parquet.write_table(pa.table({"prompt": texts, "completion": texts}), tmp_path / "a.parquet", compression="none")
    reader = load_conversations(tmp_path / "a.parquet", "skip")
    assert [row["messages"][0]["content"] for row in reader] == ["a", "b"] and reader.rejected == 1
    assert "a.parquet:2: longer than 16,777,216 bytes" in refused(tmp_path / "a.parquet")


def test_real_data_is_within_the_bounds(tmp_path: Path) -> None:
    """Conversations under one system prompt, packed as well as can be."""
    rows = [{"system": "You are a helpful assistant." * 20, "prompt": f"{i}?", "completion": str(i)} for i in range(9)]
    parquet.write_table(pa.Table.from_pylist(rows * 9), tmp_path / "a.parquet", compression="zstd")
    assert len(list(load_conversations(tmp_path / "a.parquet"))) == 81


# --- patterns ------------------------------------------------------------------------------------------------------

WORDS = " ".join(f"w{i}x{i * 7}" for i in range(200))


def test_a_pattern_that_never_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversations.answers.text.MOST_SECONDS", 0.002)
    evil = r"(\w?\w?\w?\w?\s?)+(\w|\w\w|\s)+(\w|\w\w|\s)+!"
    with pytest.raises(ToolkitError, match=r"takes over 0\.002 s, the most that is allowed"):
        verify("format", f"{WORDS} ! a", patterns=[evil])


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("[", "is not a regular expression"),
        ("(" * 5000, "is not a regular expression"),
        ("a{99999999999}", "repeats too much"),
        ("((a{1000}){1000}){1000}", "repeats too much"),
    ],
)
def test_patterns_of_a_task_are_looked_at_with_the_recipe(pattern: str, fault: str) -> None:
    task = {"name": "a", "metric": "format", "patterns": [pattern], "data": [{"path": "a.jsonl"}]}
    with pytest.raises(ToolkitError, match=f"tasks.0.patterns: the pattern '.*{fault}"):
        validate({"stage": "eval", "model": {"path": "m"}, "output_dir": "o", "tasks": [task]})


def test_patterns_with_repeated_groups_are_fine() -> None:
    assert verify("format", "12, 7, 90", patterns=[r"(\d+, )*\d+"]).score == 1
    assert verify("format", "12, 7, ", patterns=[r"(\d+, )*\d+"]).score == 0
