"""Packed data and patterns of a recipe that would take all memory, disk or time: refused, and the bound is named."""

import gzip
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from conversations import load_conversations
from conversations.answers.rules import verify
from conversations.errors import ToolkitError
from conversations.reading import data_file
from conversations.reading.arrow_sizes import unpacked_sizes
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
    assert "decompresses to more than" in refused(path) and f"{SMALL:,}" in refused(path)


def repeated(text: str, rows: int) -> pa.Table:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    return pa.table({"prompt": column, "completion": pa.array(["b"] * rows)})


def test_a_dictionary_of_one_long_value_is_not_written_out_for_every_row(tmp_path: Path, small_bounds: None) -> None:
    parquet.write_table(repeated("a" * (SMALL // 8), 5000), tmp_path / "a.parquet", compression="zstd")
    assert "decompresses to more than" in refused(tmp_path / "a.parquet")


def test_a_parquet_file_that_says_that_it_unpacks_to_much_is_not_unpacked(tmp_path: Path, small_bounds: None) -> None:
    table = pa.table({"prompt": ["a" * SMALL * 20], "completion": ["b"]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert "decompresses to more than" in refused(tmp_path / "a.parquet")


def test_a_parquet_file_with_more_rows_than_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversations.reading.table_files._ROWS_ALLOWED", 1000)
    parquet.write_table(repeated("a", 100_000), tmp_path / "a.parquet", compression="zstd")
    assert re.search(r"has 100,000 rows in [\d,]+ bytes", refused(tmp_path / "a.parquet"))


WRITERS = {"file": ipc.new_file, "stream": ipc.new_stream}


def write_arrow(path: Path, table: pa.Table, form: str, packing: str | None, rows: int = 1 << 20) -> Path:
    with WRITERS[form](path, table.schema, options=ipc.IpcWriteOptions(compression=packing)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("packing", ["zstd", "lz4"])
@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("part", ["rows", "dictionary"])
def test_a_batch_of_an_arrow_file_is_refused_before_it_is_unpacked(
    packing: str, form: str, part: str, tmp_path: Path, small_bounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow unpacks a batch, or a dictionary, whole."""
    texts = pa.array(["a" * (SMALL * 128)])
    if part == "dictionary":
        texts = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), texts)
    path = write_arrow(tmp_path / "a.arrow", pa.table({"prompt": texts, "completion": ["b"]}), form, packing)
    monkeypatch.setattr(ipc, "open_stream", None)  # which unpacks
    assert "decompresses to more than" in refused(path) and f"{SMALL:,}" in refused(path)


@pytest.mark.parametrize("rows", [7, 100])
@pytest.mark.parametrize("packing", ["zstd", "lz4", None])
@pytest.mark.parametrize("form", WRITERS)
def test_what_an_arrow_file_unpacks_to_is_read_from_it(
    form: str, packing: str | None, rows: int, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "a" * i} for i in range(40)]
    names = pa.DictionaryArray.from_arrays(pa.array([i % 2 for i in range(40)], pa.int32()), pa.array(["x", "y" * 99]))
    table = pa.table({"turns": [[turn] * 2 for turn in turns], "names": names, "n": list(range(40))})
    batches = table.to_batches(max_chunksize=rows)
    path = write_arrow(tmp_path / "a.arrow", table, form, packing, rows)
    with path.open("rb") as content:
        content.seek(8 if form == "file" else 0)
        schema, dictionary, *sizes = unpacked_sizes(content)
    assert len(sizes) == len(batches) and schema == 0
    if packing:
        assert dictionary >= 100
        # numbers of 8 bytes, and texts and their places, of each batch
        assert all(
            size >= batch.num_rows * 8 + batch.column(0).nbytes // 2 for size, batch in zip(sizes, batches, strict=True)
        )
    else:
        assert sum(sizes) == dictionary == 0


@pytest.mark.parametrize("name", ["question", "thing"], ids=["column", "field"])
@pytest.mark.parametrize("form", WRITERS)
def test_a_name_that_is_not_utf8_is_one_message(form: str, name: str, tmp_path: Path) -> None:
    table = pa.table({"question": ["a"], "answer": [{"thing": "b"}]})
    path = write_arrow(tmp_path / "a.arrow", table, form, None)
    content = path.read_bytes()
    assert name.encode() in content
    path.write_bytes(content.replace(name.encode(), b"\x81" + name.encode()[1:]))
    assert "not valid UTF-8" in refused(path)


@settings(max_examples=200, deadline=None)
@example(where=220, byte=7, cut=0, data=b"")  # a length of exabytes
@given(where=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.integers(0, 2000), data=st.binary(max_size=40))
def test_a_damaged_arrow_file_is_one_message(
    where: int, byte: int, cut: int, data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    table = pa.table({"prompt": ["a" * i for i in range(1, 20)], "completion": ["b"] * 19})
    path = write_arrow(tmp_path_factory.getbasetemp() / "damaged.arrow", table, "file", "zstd")
    content = bytearray(path.read_bytes())
    content[where % len(content)] = byte
    content[cut % len(content) :] = data + bytes(content[cut % len(content) :]) if byte % 2 else data
    path.write_bytes(content)
    with suppress(ToolkitError):
        list(load_conversations(path, "skip"))


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
    with pytest.raises(ToolkitError, match=r"took more than 0\.002 s, the limit"):
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
