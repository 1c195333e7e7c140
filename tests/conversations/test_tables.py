"""CSV, TSV and parquet files, and what is compressed: the same rows as JSON lines, bad ones with their place."""

import csv
import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversations import load_conversations
from conversations.errors import ToolkitError
from conversations.reading import data_file


def rows_of(path, **settings_) -> list[dict]:
    return list(load_conversations(path, **settings_))


def rejected_in(path) -> list[tuple[int, str]]:
    found = []
    rows_of(path, on_bad_row="skip", on_rejected=found.append)
    return [(each.line, each.reason) for each in found]


def table_text(names, rows, delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(names)
    writer.writerows(rows)
    return out.getvalue()


CELLS = st.text(st.sampled_from('a",\t\n\r\\ é你🙂\u2028;')).map("Q".__add__)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), st.booleans())
def test_every_kind_of_file_gives_the_same_rows(tmp_path, cells, bom):
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in cells]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for kind, delimiter in ((".csv", ","), (".tsv", "\t")):
        text = "\ufeff" * bom + table_text(["prompt", "completion"], cells, delimiter)
        (tmp_path / f"a{kind}").write_bytes(text.encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    wanted = rows_of(tmp_path / "a.jsonl")
    for kind in (".csv", ".tsv", ".parquet"):
        data = (tmp_path / f"a{kind}").read_bytes()
        (tmp_path / f"a{kind}.gz").write_bytes(gzip.compress(data))
        (tmp_path / f"a{kind}.ZST").write_bytes(pa.compress(data, codec="zstd", asbytes=True))
        for name in (f"a{kind}", f"a{kind}.gz", f"a{kind}.ZST"):
            assert rows_of(tmp_path / name) == wanted, name


def test_bad_rows_of_a_csv_file(tmp_path):
    path = tmp_path / "a.csv"
    good = b"Q,A,1\n"
    bad = [b"Q,A\n", b'Q,"A"B,1\n', b"Q\xff,A,1\n", b"\xef\xbb\xbfQ,A,1\n", b",A,1\n", b"Q\0,A,1\n", b"Q,A,high\n"]
    path.write_bytes(b"prompt,completion,score\n" + good + b'"Q\nQ",A,2\n\n' + b"".join(line + good for line in bad))
    lines = [(line, reason.split(":")[0]) for line, reason in rejected_in(path)]
    assert lines == [
        (6, "2 fields, but the first line names 3 columns"),
        (8, "broken quotes"),
        (10, "not valid UTF-8"),
        (12, "a byte order mark in the middle of the file"),
        (14, "turn 1 (user) is empty"),
        (16, "prompt contains a NUL character"),
        (18, "score must be a finite number, not 'high'"),
    ]
    assert len(rows_of(path, on_bad_row="skip")) == 2 + len(bad)
    with pytest.raises(ToolkitError, match=r"7 of 16 rows cannot be used\n  .*a\.csv:6: 2 fields"):
        rows_of(path)


def test_a_line_that_is_too_long_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(data_file, "LONGEST_ROW", 100)
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,completion\nQ,A\nQ,{'A' * 200}\nQ,A\nQ,\n")
    assert rejected_in(path) == [(3, data_file.TOO_LONG), (5, "turn 2 (assistant) is empty: completion")]


def test_a_quote_that_does_not_end_says_how_far_it_goes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\nQ,A\nQ,"A\nQ,A\nQ,A\n')
    ((line, reason),) = rejected_in(path)
    assert line == 3 and reason.endswith("its quotes make this row end on line 5")


@pytest.mark.parametrize(
    ("first", "wrong"), [("prompt,prompt", "names 'prompt' twice"), ("prompt,", "has an empty name")]
)
def test_the_first_line_must_name_the_columns(tmp_path, first, wrong):
    (tmp_path / "a.csv").write_text(f"{first}\nQ,A\n")
    with pytest.raises(ToolkitError, match=rf"a\.csv:1: the first line {wrong}"):
        rows_of(tmp_path / "a.csv")


def test_a_table_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,completion\nQ,A\n".encode("utf-16"))
    with pytest.raises(ToolkitError, match=r"a\.csv:1: not valid UTF-8"):
        rows_of(tmp_path / "a.csv", on_bad_row="skip")


@pytest.mark.parametrize("content", ["", "prompt,completion\n"])
def test_a_table_without_rows_is_empty(tmp_path, content):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ToolkitError, match="no rows: the file is empty"):
        rows_of(tmp_path / "a.csv")


def test_parquet_keeps_nested_values_and_names_bad_rows_by_number(tmp_path):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    table = pa.Table.from_pylist([{"messages": messages, "when": 1}, {"messages": [], "when": 2}])
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet", on_bad_row="skip") == [{"messages": messages, "meta": {"when": 1}}]
    assert rejected_in(tmp_path / "a.parquet") == [(2, "the conversation has no turns")]


def test_a_table_with_bytes_that_are_no_utf8(tmp_path):
    text = pa.array([b"Q", b"Q\xff", b"R"], pa.binary()).cast(pa.string(), safe=False)
    turns = pa.StructArray.from_arrays([pa.array(["user"] * 3), text], ["role", "content"])
    nested = [kind.from_arrays([0, 1, 2, 3], turns) for kind in (pa.ListArray, pa.LargeListArray)]
    for table in (pa.table({"prompt": text}), *(pa.table({"messages": lists}) for lists in nested)):
        pq.write_table(table, tmp_path / "a.parquet")
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
        for name in ("a.parquet", "a.arrow"):
            assert rejected_in(tmp_path / name) == [(2, "not valid UTF-8")]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst", "a.parquet.zst", "a.csv.gz"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text")
    with pytest.raises(ToolkitError, match=rf"{name}: cannot be read"):
        rows_of(tmp_path / name)


def test_a_zst_file_that_was_cut_off(tmp_path):
    data = b"".join(json.dumps({"prompt": f"{i * 7919}"}).encode() + b"\n" for i in range(9999))
    packed = pa.compress(data, codec="zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-99])
    with pytest.raises(ToolkitError, match="cannot be read"):
        rows_of(tmp_path / "a.jsonl.zst")
    (tmp_path / "a.jsonl.zst").write_bytes(packed + packed)  # two frames are one file
    assert len(rows_of(tmp_path / "a.jsonl.zst")) == 2 * 9999


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_memory_stays_flat(tmp_path, name):
    rows = [(f"{i} " + "x" * 200, "A") for i in range(8000)]
    if name == "a.csv":
        (tmp_path / name).write_text(table_text(["prompt", "completion"], rows, ","))
    else:
        columns = {"prompt": [prompt for prompt, _ in rows], "completion": ["A"] * len(rows)}
        pq.write_table(pa.table(columns), tmp_path / name)
    tracemalloc.start()
    assert sum(1 for _ in load_conversations(tmp_path / name)) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8000 * 202 / 2
