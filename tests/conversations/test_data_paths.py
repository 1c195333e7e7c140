"""What a data path may name: folders, patterns, archives, what `save_to_disk` writes, objects over several lines."""

import gzip
import io
import json
import re
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from conversations import load_conversations
from conversations.errors import ToolkitError
from conversations.reading import json_files as json_records
from conversations.sections import DataSource
from recipes.data.sources import read_sources, source_hash


def row(text: str) -> dict:
    return {"prompt": text, "response": "A"}


def lines(*texts: str) -> str:
    return "".join(json.dumps(row(text)) + "\n" for text in texts)


def asked(path, **settings) -> list[str]:
    return [each["messages"][0]["content"] for each in load_conversations(path, **settings)]


def table(*texts: str) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row(text) for text in texts]), out)
    return out.getvalue()


def mixed_folder(folder: Path) -> Path:
    (folder / "part").mkdir(parents=True)
    (folder / "b.ndjson").write_text(lines("3"))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines("1", "2").encode()))
    (folder / "part" / "c.parquet").write_bytes(table("4"))
    (folder / "README.md").write_text("words")
    (folder / "notes.docx").write_text("words")
    return folder


def test_a_folder_and_a_pattern_are_read_in_the_order_of_names(tmp_path):
    folder = mixed_folder(tmp_path / "d")
    assert asked(folder) == ["1", "2", "3", "4"]
    assert asked(tmp_path / "d" / "*.*") == ["1", "2", "3"]
    assert asked(tmp_path / "**" / "*.parquet") == ["4"]
    reader = load_conversations(folder)
    places = [reader.place for _ in reader]
    assert places == ["d/a.jsonl.gz:1", "d/a.jsonl.gz:2", "d/b.ndjson:1", "d/part/c.parquet:1"]
    assert reader.summary() == "d: prompt/response, 4 rows"
    assert reader.notes() == ["files of unsupported types, not read: notes.docx"]


def test_a_bad_row_of_a_folder_names_its_file(tmp_path):
    folder = mixed_folder(tmp_path / "d")
    (folder / "part" / "e.csv").write_text("prompt,response\nQ,\n")
    with pytest.raises(ToolkitError, match=r"1 of 5 rows cannot be used\n  .*d/part/e\.csv:2: turn 2 \(assistant\) is"):
        asked(folder)


def test_a_zip_is_as_a_folder(tmp_path):
    folder = mixed_folder(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/._a.jsonl", "x")
    assert asked(tmp_path / "d.zip") == asked(folder)
    reader = load_conversations(tmp_path / "d.zip")
    assert [reader.place for _ in reader][3] == "d.zip/part/c.parquet:1"


def test_zips_that_cannot_be_read(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK no archive")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.docx", "x")
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", lines("1"))
    whole = (tmp_path / "c.zip").read_bytes()
    (tmp_path / "d.zip").write_bytes(
        whole.replace(b"\x01\x02\x14\x03\x14\x00\x00\x00", b"\x01\x02\x14\x03\x14\x00\x01\x00")
    )
    for name, reason in (
        ("a", "cannot be read"),
        ("b", "no file of a supported type .*a.docx"),
        ("d", "encrypted|password"),
    ):
        with pytest.raises(ToolkitError, match=reason):
            asked(tmp_path / f"{name}.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(tmp_path):
    """Else the second would be read twice and the first never."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", lines("1"))
        archive.writestr("a.jsonl", lines("2"))
    with pytest.raises(ToolkitError, match=r"a\.zip contains a\.jsonl twice"):
        asked(tmp_path / "a.zip")


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|"), ("a.tsv", ",")])
def test_another_delimiter(tmp_path, name, mark):
    (tmp_path / name).write_text(f"question{mark}answer\nQ{mark}A\n")
    with pytest.raises(ToolkitError, match=rf"{name}:1: the first line has {re.escape(repr(mark))} between"):
        asked(tmp_path / name)


def test_a_member_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("conversations.reading.data_file.ALWAYS_ALLOWED", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", " " * 5_000_000)
    with pytest.raises(ToolkitError, match=r"a\.zip: decompresses to more than .* bytes, 200 times its size"):
        asked(tmp_path / "a.zip")


def test_what_save_to_disk_wrote(tmp_path):
    parts = {name: Dataset.from_list([row(f"{name} {i}") for i in range(3)]) for name in ("train", "test")}
    parts["test"].save_to_disk(tmp_path / "one", num_shards=3)
    parts["train"].save_to_disk(tmp_path / "one", num_shards=2)  # leaves the other files there
    assert len(list((tmp_path / "one").glob("*.arrow"))) == 5
    DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert asked(tmp_path / "one") == ["train 0", "train 1", "train 2"]
    assert asked(tmp_path / "both") == ["train 0", "train 1", "train 2"]
    assert asked(tmp_path / "both", split="test") == ["test 0", "test 1", "test 2"]
    with pytest.raises(ToolkitError, match="no split 'dev'; it has train, test"):
        asked(tmp_path / "both", split="dev")
    mixture = read_sources([DataSource(path=str(tmp_path / "both"), split="test[:2]")], seed=0)
    assert len(mixture.rows) == 2 and mixture.lines[1] == "both: split test of both; not read: train"


@pytest.mark.parametrize("writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_both_forms_of_arrow(tmp_path, writer):
    rows = pa.Table.from_pylist([row(str(i)) for i in range(1200)])
    with writer(str(tmp_path / "a.arrow"), rows.schema) as out:
        out.write_table(rows)
    assert asked(tmp_path / "a.arrow") == [str(i) for i in range(1200)]
    (tmp_path / "a.arrow").write_bytes(b"no arrow at all")
    with pytest.raises(ToolkitError, match="arrow: cannot be read"):
        asked(tmp_path / "a.arrow")


def test_a_folder_of_the_hub_has_splits(tmp_path):
    (tmp_path / "h" / "data").mkdir(parents=True)
    (tmp_path / "h" / "dataset_infos.json").write_text("{}")
    for name in ("train-00001-of-00002", "test-00000-of-00001", "train-00000-of-00002"):
        (tmp_path / "h" / "data" / f"{name}.parquet").write_bytes(table(name))
    assert asked(tmp_path / "h") == ["train-00000-of-00002", "train-00001-of-00002"]
    assert asked(tmp_path / "h", split="test") == asked(tmp_path / "h", split="eval") == ["test-00000-of-00001"]
    assert load_conversations(tmp_path / "h").notes() == ["split train of h; not read: test"]
    for file in (tmp_path / "h" / "data").glob("train*"):
        file.rename(file.with_name(file.name.replace("train", "dev")))
    with pytest.raises(ToolkitError, match="has several splits and none called train; it has"):
        asked(tmp_path / "h")


def test_the_hash_of_a_source_follows_its_files(tmp_path):
    folder = mixed_folder(tmp_path / "d")
    entry = DataSource(path=str(folder))
    before = source_hash(entry, 0, "data.0")
    assert source_hash(entry, 0, "data.0") == before
    (folder / "b.ndjson").write_text(lines("5"))
    assert source_hash(entry, 0, "data.0") != before


OBJECTS = [
    ({"data": [row("1"), row("2")]}, ["1", "2"]),
    ({"version": "1.0", "train": [row("1")], "n": {"a": [1]}}, ["1"]),
    (row("1"), ["1"]),
    ({"messages": [{"role": "user", "content": "1"}], "data": ["no", "rows"]}, ["1"]),
    ({"data": [], "prompt": "1"}, ["1"]),
]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize(("content", "texts"), OBJECTS)
def test_one_object_of_rows(tmp_path, monkeypatch, content, texts, indent, chunk):
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(content, indent=indent), encoding="utf-8")
    assert asked(tmp_path / "a.json") == texts


def test_objects_over_several_lines_one_after_the_other(tmp_path):
    (tmp_path / "a.json").write_text("\n".join(json.dumps(row(text), indent=1) for text in "123"))
    assert asked(tmp_path / "a.json") == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{\n"prompt": "1"\n"response": "2"}', "a.json:3: broken JSON: the object lacks a comma after a value"),
        ('{\n"prompt" "1"}', "a.json:2: broken JSON: the object lacks a colon after a key"),
        ('{\n"prompt": "1"', "the object is not closed"),
        ('{\n"prompt": "1",\n"response": "2"} x', "more text after the end of the object"),
        ('{"data": [{"prompt": "1"},\n', "the array is not closed|Expecting value"),
        ('{"train": [{}], "data": [\n{}]}', "an object with 2 lists of rows"),
    ],
)
def test_a_broken_object(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ToolkitError, match=reason):
        asked(tmp_path / "a.json")


def test_memory_stays_flat_in_an_object(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "_CHUNK", 1 << 14)
    (tmp_path / "a.json").write_text(json.dumps({"data": [row("x" * 200) for _ in range(8000)]}))
    tracemalloc.start()
    assert sum(1 for _ in load_conversations(tmp_path / "a.json")) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8000 * 200 / 4


def test_a_table_with_the_index_of_pandas(tmp_path):
    (tmp_path / "a.csv").write_text(",prompt,response\n0,Q,A\n1,R,B\n")
    reader = load_conversations(tmp_path / "a.csv")
    assert len(list(reader)) == 2 and reader.notes() == ["columns not used: Unnamed: 0 (2 rows)"]


CALLS = [("w", {"city": "X"}), ("add", {"a": 1, "b": 2})]


def tool_row(name: str, arguments: dict) -> dict:
    kinds = {key: {"type": "string" if isinstance(value, str) else "number"} for key, value in arguments.items()}
    definition = {"name": name, "parameters": {"type": "object", "properties": kinds}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    return {
        "tools": [{"type": "function", "function": definition}],
        "messages": [{"role": "user", "content": "Q"}, call, {"role": "tool", "content": "R"}],
    }


def test_tools_are_the_same_text_in_a_table(tmp_path):
    rows = [tool_row(*call) for call in CALLS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    wanted = list(load_conversations(tmp_path / "a.jsonl"))
    assert list(load_conversations(tmp_path / "a.parquet")) == list(load_conversations(tmp_path / "d")) == wanted
    assert "null" not in json.dumps(wanted)
