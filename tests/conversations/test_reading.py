"""Files to rows: everything in the file is either a row or a rejected row with its place and reason."""

import gzip
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversations import load_conversations
from conversations.errors import ToolkitError
from conversations.reading import json_files as json_records


def row(text: str = "Q") -> dict:
    return {"question": text, "answer": "A"}


def write_lines(path, *lines: str | dict | bytes):
    """Write one line for each argument."""
    pieces = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"".join(piece + b"\n" for piece in pieces))
    return path


def questions(rows) -> list[str]:
    return [each["messages"][0]["content"] for each in rows]


def failure(path, **settings_) -> str:
    with pytest.raises(ToolkitError) as caught:
        list(load_conversations(path, **settings_))
    return str(caught.value)


def test_says_what_it_found(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", row("1"), "", row("2"), {"prompt": "3"}, "")
    reader = load_conversations(path)
    assert questions(reader) == ["1", "2", "3"]
    assert reader.summary() == "a.jsonl: question/answer, 2 rows; prompts, 1 row"
    assert reader.formats == {"question/answer": 2, "prompts": 1}


ARRAY = ["[", json.dumps(row("1")) + ",", json.dumps(row("2"), indent=1), "]"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "A.JSON"])
@pytest.mark.parametrize(
    "lines", [ARRAY, [row("1"), row("2")], ["\ufeff[", *ARRAY[1:]], ["\ufeff" + json.dumps(row("1")), row("2")]]
)
def test_array_and_lines_are_told_apart_by_content(tmp_path, name, lines):
    assert questions(load_conversations(write_lines(tmp_path / name, *lines))) == ["1", "2"]


@pytest.mark.parametrize("line", ["{broken", {"Title": "T", "Answer": "A"}])
def test_a_bad_row_beside_mapped_columns(tmp_path, line):
    path = write_lines(tmp_path / "a.jsonl", {"Body": "Q", "Answer": "A"}, line)
    columns = {"prompt": "Body", "response": "Answer"}
    assert f"{path}:2: " in failure(path, columns=columns)
    reader = load_conversations(path, "skip", columns=columns)
    assert questions(reader) == ["Q"] and reader.rejected == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_gzip(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(json.dumps(row("1")).encode()))
    assert questions(load_conversations(tmp_path / name)) == ["1"]


# Line separators of Unicode, the array's own marks, and characters of 1 to 4 bytes.
WORDS = st.text(st.sampled_from('a"\\[]{},: \u2028\u0085é你🙂\n')).map("Q".__add__)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(WORDS, min_size=1, max_size=5),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 50),
)
def test_array_and_lines_give_the_same_rows_however_the_file_is_cut(
    tmp_path, monkeypatch, words, indent, ascii_only, chunk
):
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    rows = [row(text) for text in words]
    array = tmp_path / "array.json"
    array.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    lines = write_lines(tmp_path / "lines.jsonl", *(json.dumps(each, ensure_ascii=ascii_only) for each in rows))
    assert questions(load_conversations(array)) == questions(load_conversations(lines)) == words


BAD_LINES = [
    (b'{"question": "Q"', r"broken JSON: Expecting ',' delimiter \(column 17\)"),
    (b'{"question": "Q\xff", "answer": "A"}', "not valid UTF-8"),
    (b'\xef\xbb\xbf{"question": "Q", "answer": "A"}', "broken JSON: Unexpected UTF-8 BOM"),
    (b'{"question": "Q\\ud800", "answer": "A"}', "question contains half of a surrogate pair"),
    (b'{"question": "Q\\u0000", "answer": "A"}', "question contains a NUL"),
    (b'{"question": "Q", "answer": "A", "answer": "B"}', "unreadable JSON: the key 'answer' is given twice, with"),
    (b'{"question": "Q", "answer": "A", "more": {"a": 1, "a": 2}}', "unreadable JSON: the key 'a' is given twice"),
    (b"42", "not an object: 42"),
    (b'"text"', 'not an object: "text"'),
    (b"null", "not an object: null"),
    (b"[" * 100_000, "unreadable JSON"),
    (b'{"question": ' + b"1" * 5000 + b"}", "unreadable JSON"),
    (b'{"turns": []}', "no known format has the keys turns"),
    (b"{}", r"no known format has the keys \(none\)"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_is_named_in_error_mode_and_left_out_in_skip_mode(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", row("1"), "", line, row("2"))
    with pytest.raises(ToolkitError, match=rf"a\.jsonl:3: {reason}"):
        list(load_conversations(path))
    rejected = []
    reader = load_conversations(path, on_bad_row="skip", on_rejected=rejected.append)
    assert questions(reader) == ["1", "2"]
    assert [(each.line, each.file) for each in rejected] == [(3, str(path))]
    assert rejected[0].as_dict() == {
        "file": str(path),
        "line": 3,
        "reason": rejected[0].reason,
        "row": line.decode(errors="surrogateescape").replace("\udcff", "\\udcff"),
    }
    json.dumps(rejected[0].as_dict(), ensure_ascii=False).encode()
    assert reader.summary() == "a.jsonl: question/answer, 2 rows; 1 row left out"


def test_error_mode_lists_ten_and_counts_all(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", row(), *["{"] * 12, row())
    message = failure(path)
    assert message.startswith(f"{path}: 12 of 14 rows cannot be used\n  {path}:2: broken JSON")
    assert f"{path}:11: broken JSON" in message and f"{path}:12:" not in message
    assert "... and 2 more" in message and "on_bad_row: skip" in message


def test_error_mode_yields_nothing_behind_the_first_bad_row(tmp_path):
    reader = load_conversations(write_lines(tmp_path / "a.jsonl", row("1"), "{", row("2")))
    assert questions([next(reader)]) == ["1"]
    with pytest.raises(ToolkitError):
        next(reader)


def test_unknown_keys_bring_the_list_of_formats_and_the_mapping(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"Body": "Q", "Answer": "A"})
    assert "columns" in failure(path) and "question + answer" in failure(path)
    assert questions(load_conversations(path, columns={"prompt": "Body", "response": "Answer"})) == ["Q"]


@pytest.mark.parametrize(
    ("text", "line", "reason", "good"),
    [
        (
            '[{"question": "1", "answer": "A"},\n 42,\n {"question": "2", "answer": "A"}]',
            2,
            "not an object: 42",
            ["1", "2"],
        ),
        ('[{"question": "1", "answer": "A"},\n\n {"question": ]', 3, "broken JSON: .*nothing after it", ["1"]),
        ('[{"question": "1", "answer": "A"}\n {"question": "2"}]', 2, "broken JSON: .* lacks a comma", ["1"]),
        ('[{"question": "1", "answer": "A"}\n', 2, "broken JSON: the array is not closed", ["1"]),
        (
            '[{"question": "1", "answer": "A"}]\n{"question": "2"}',
            2,
            "broken JSON: more text after the end of the array",
            ["1"],
        ),
        ('[{"question": "1", "answer": "A"},\n{"question": "\udcff", "answer": "A"}]', 2, "not valid UTF-8", ["1"]),
    ],
)
def test_bad_element_of_an_array(tmp_path, text, line, reason, good):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ToolkitError, match=rf"a\.json:{line}: {reason}"):
        list(load_conversations(path))
    assert questions(load_conversations(path, on_bad_row="skip")) == good


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"question": ', "Expecting value"),
        ("{]}", "Expecting property name"),
        ("{]" + "x" * 900, "Expecting property name"),  # more than is looked at before it is given up
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_behind_a_broken_element_an_array_goes_on_with_the_next_line_that_begins_alike(
    tmp_path, monkeypatch, broken, reason, indent, chunk
):
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    monkeypatch.setattr(json_records, "LONGEST_ROW", 300)
    whole = [json.dumps(row(str(i)) | {"meta": {"deep": [{"a": 1}]}}, indent=indent) for i in range(4)]
    text = ",\n".join([*whole[:2], broken, *whole[2:]]).replace("\n", "\r\n  ")
    path = tmp_path / "a.json"
    path.write_bytes(f"[\r\n  {text}\r\n]".encode())
    rejected = []
    reader = load_conversations(path, on_bad_row="skip", on_rejected=rejected.append)
    assert questions(reader) == ["0", "1", "2", "3"]
    ((line, told),) = [(each.line, each.reason) for each in rejected]
    assert line == 2 + 2 * len(whole[0].splitlines()) and told.startswith(f"broken JSON: {reason}")
    assert "nothing after it" not in told


@pytest.mark.parametrize("comma", ["", ";"])
def test_behind_a_missing_comma_an_array_goes_on(tmp_path, comma):
    path = tmp_path / "a.json"
    one, two, three = (json.dumps(row(name)) for name in "123")
    path.write_text(f"[\n{one}{comma}\n{two},\n{three}\n]")
    rejected = []
    assert questions(load_conversations(path, on_bad_row="skip", on_rejected=rejected.append)) == ["1", "2", "3"]
    assert [each.reason for each in rejected] == ["broken JSON: the array lacks a comma after an element"]


def test_of_an_array_on_one_line_the_element_is_told(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([row(), row(), {"question": "Q", "answer": ""}, 42]))
    message = failure(tmp_path / "a.json")
    assert "a.json:1: element 3: turn 2 (assistant) is empty" in message
    assert "a.json:1: element 4: not an object: 42" in message


@pytest.mark.parametrize(("limit", "fails"), [(1, True), (2, False), (0.4, True), (0.5, False), (None, False)])
def test_max_bad_rows_is_a_number_or_a_share(tmp_path, limit, fails):
    path = write_lines(tmp_path / "a.jsonl", row(), "{", "{", row())
    if fails:
        assert f"max_bad_rows = {limit}" in failure(path, on_bad_row="skip", max_bad_rows=limit)
    else:
        assert len(list(load_conversations(path, on_bad_row="skip", max_bad_rows=limit))) == 2


@pytest.mark.parametrize("content", ["", "\n\n", "[]", " [ ]\n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert "no rows: the file is empty" in failure(tmp_path / "a.json")


def test_file_without_a_good_row_fails_in_skip_mode_too(tmp_path):
    message = failure(write_lines(tmp_path / "a.jsonl", "{", "{"), on_bad_row="skip")
    assert "none of 2 rows can be used" in message and "a.jsonl:1: broken JSON" in message


def test_wrong_arguments_fail_at_the_call(tmp_path):
    (tmp_path / "a.docx").touch()
    (tmp_path / "folder").mkdir()
    for name in ("README.md", ".hidden.jsonl", "b.docx", "c.xls", "dataset_infos.json"):
        (tmp_path / "folder" / name).touch()
    good = write_lines(tmp_path / "a.jsonl", row())
    for path, settings_, reason in (
        (tmp_path / "none.jsonl", {}, "none.jsonl: no such file"),
        (tmp_path / "folder", {}, "contains no file of a supported type .*, but b.docx, c.xls"),
        (tmp_path / "*.xyz", {}, "the pattern matches no file of a supported type"),
        (tmp_path / "a.docx", {}, "unsupported file type; supported types are .jsonl"),
        (good, {"on_bad_row": "ignore"}, "on_bad_row is 'ignore'; use one of error, skip"),
    ):
        with pytest.raises(ToolkitError, match=reason):
            load_conversations(path, **settings_)


def test_broken_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(json.dumps(row()).encode() * 100)
    for content in (b"plain text", whole[:-20]):
        path.write_bytes(content)
        assert "a.jsonl.gz: cannot be read" in failure(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_memory_stays_flat(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_records, "_CHUNK", 1 << 14)
    lines = [json.dumps(row(f"{i} " + "x" * 200)) for i in range(8000)]
    text = "[" + ",\n".join(lines) + "]" if name == "a.json" else "\n".join(lines)
    (tmp_path / name).write_text(text)
    tracemalloc.start()
    assert sum(1 for _ in load_conversations(tmp_path / name)) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(text) / 4


def test_number_that_is_cut_between_two_reads_stays_one_number(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "_CHUNK", 3)
    (tmp_path / "a.json").write_text(f"[{10**20}, {json.dumps(row())}]")
    rejected = []
    assert questions(load_conversations(tmp_path / "a.json", on_bad_row="skip", on_rejected=rejected.append)) == ["Q"]
    assert [each.reason for each in rejected] == [f"not an object: {10**20}"]


def test_a_key_twice_in_arrays_and_objects(tmp_path):
    """With two values the row is bad; with one value nothing is lost."""
    once = json.dumps(row("Q"))
    (tmp_path / "a.json").write_text(f'[\n{once},\n{{"question": "P", "question": "R", "answer": "A"}},\n{once}\n]')
    rejected = []
    reader = load_conversations(tmp_path / "a.json", on_bad_row="skip", on_rejected=rejected.append)
    assert questions(reader) == ["Q", "Q"] and [bad.line for bad in rejected] == [3]
    (tmp_path / "b.json").write_text('{\n"question": "P",\n"question": "R",\n"answer": "A"\n}')
    with pytest.raises(ToolkitError, match="the key 'question' is given twice"):
        list(load_conversations(tmp_path / "b.json"))
    (tmp_path / "c.jsonl").write_text('{"question": "P", "question": "P", "answer": "A"}')
    assert questions(load_conversations(tmp_path / "c.jsonl")) == ["P"]
