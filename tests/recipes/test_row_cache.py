"""Cached rows: the same as without the cache, reused where nothing has changed, whole or absent."""

import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations.answers.usable_rows import no_answer
from conversations.errors import ToolkitError
from conversations.rendering.fitting import Fitter
from conversations.rendering.lengths import LengthReport
from conversations.row_cache import RowCache
from conversations.scratch import PREFIX, remove_scratch, scratch_directory
from conversations.sections import DataSource
from deepseek_v2_modeling.training import IGNORED
from recipes.cli import main
from recipes.data.sources import Mixture, read_sources
from recipes.files import file_sha256
from reward.data import encode_judged, encode_pairs
from sft.data import encode_rows

from ..helpers.stages import assistant, byte_tokenizer, user

TOKENIZER = byte_tokenizer()
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), min_size=1, max_size=12) | st.sampled_from(
    ["<eos>", "User: a", " ", "\n\nAssistant:", "你好 🙂", "<｜fim▁hole｜>"]
)
TURNS = st.lists(st.tuples(WORDS, WORDS, st.sampled_from([None, None, False, True])), min_size=1, max_size=4)
BESIDE = st.fixed_dictionaries(
    {}, optional={"system": WORDS, "id": st.integers(0, 9), "reasoning": WORDS, "tools": st.just([{"name": "add"}])}
)


def conversation(turns: list[tuple[str, str, bool | None]], beside: dict[str, Any]) -> dict[str, Any]:
    messages = []
    for asked, said, train in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        if train is not None:
            messages[-1]["train"] = train
    return {"messages": messages, **beside}


ROWS = st.lists(
    st.builds(conversation, TURNS, BESIDE)
    | st.builds(lambda text: {"text": text}, WORDS)
    | st.sampled_from([{"messages": []}, {"other": 1}, {"messages": [{"role": "user", "content": "unanswered"}]}]),
    min_size=1,
    max_size=12,
)
FORMATS: Any = st.fixed_dictionaries(
    {
        "train_on": st.sampled_from(["all_assistant", "last_assistant"]),
        "max_length": st.integers(8, 90) | st.none(),
        "too_long": st.sampled_from(["truncate", "drop", "split"]),
    }
)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, cache: RowCache | None, reasoning: Any = "drop") -> Mixture:
    entry = DataSource(path=str(path), on_bad_row="skip")
    return read_sources([entry], 0, refuse=no_answer, reasoning=reasoning, cache=cache, refuses_by="sft")


def contents_of(mixture: Mixture) -> list[Any]:
    return [list(mixture.rows), mixture.rejected, mixture.files, mixture.lines]


def one_by_one(rows: Any, train_on: Any, max_length: int | None, too_long: Any) -> tuple[list[Any], LengthReport]:
    """What encoding all rows at once must give."""
    report, found = LengthReport(), []
    fitter = Fitter(TOKENIZER, max_length, too_long, train_on)
    for row in rows:
        for ids, mask in fitter.pieces(row, report):
            labels = [token if on else IGNORED for token, on in zip(ids, mask, strict=True)]
            found.append({"input_ids": ids, "labels": labels, "origin": row["origin"]})
    return found, report


@given(rows=ROWS, form=FORMATS, reasoning=st.sampled_from(["drop", "think_tags", "refuse"]))
@settings(max_examples=60, deadline=None)
def test_what_is_found_is_what_was_read_and_encoded_row_by_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], form: dict[str, Any], reasoning: str
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    path, cache = write(folder / "rows.jsonl", rows), RowCache(folder / "prepared", "1")
    try:
        plain = read(path, None, reasoning)
    except ToolkitError as error:
        with pytest.raises(ToolkitError) as again:
            read(path, cache, reasoning)
        assert str(again.value) == str(error) and not list(folder.glob("prepared/rows-*"))
        return
    made, found = read(path, cache, reasoning), read(path, cache, reasoning)
    assert "reused from" in found.read and "reused from" not in made.read
    assert contents_of(plain) == contents_of(made) == contents_of(found)
    expected, report = one_by_one(plain.rows, **form)
    if not expected:
        with pytest.raises(ToolkitError, match="no row is left"):
            encode_rows(made.rows, TOKENIZER, **form, cache=cache)
        assert not list(folder.glob("prepared/tokens-*"))
        return
    for mixture, place in ((plain, None), (made, cache), (found, cache)):
        encoded = encode_rows(mixture.rows, TOKENIZER, **form, cache=place)
        assert encoded.data.to_list() == expected and encoded.report == report
        assert encoded.entry.hit == (mixture is found)
    remove_scratch()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("shows", [True, False])
def test_one_process_alone_draws_bars(shows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "__stderr__", terminal := Terminal())
    path = write(tmp_path / "rows.jsonl", [conversation([("a", "b", None)], {})])
    cache = RowCache(tmp_path / "prepared", "1", shows=shows)
    rows = read(path, cache).rows
    encode_rows(rows, TOKENIZER, train_on="all_assistant", max_length=None, too_long="drop", cache=cache)
    assert [what in terminal.getvalue() for what in ("reading", "encoding")] == [shows, shows]


def test_pairs_and_judged_answers_are_found_again(tmp_path: Path) -> None:
    cache = RowCache(tmp_path / "prepared", "1")
    asked = [
        {"prompt": user(f"a {i}"), "chosen": assistant("b" * i), "rejected": assistant("c" * 9)} for i in range(1, 6)
    ]
    labels = [{"prompt": user("a"), "completion": assistant("b" * i), "label": bool(i % 2)} for i in range(1, 6)]
    scores = [{"prompt": user("a"), "completion": assistant("b" * i), "score": i / 8} for i in range(1, 6)]
    for encode, rows in ((encode_pairs, asked), (encode_judged, labels), (encode_judged, scores)):
        mixture = read_sources([DataSource(path=str(write(tmp_path / "rows.jsonl", rows)))], 0, cache=cache)
        plain, made, found = (
            encode(mixture.rows, TOKENIZER, max_length=20, too_long="truncate", cache=place)
            for place in (None, cache, cache)
        )
        assert plain.data.to_list() == made.data.to_list() == found.data.to_list() and len(plain.data) == 5
        assert plain.report == made.report == found.report
        assert found.entry.hit and not made.entry.hit and not plain.entry.stored


def test_whatever_the_rows_depend_on_makes_them_anew(tmp_path: Path) -> None:
    """And what they do not depend on finds them: a seed, of one source that is all used."""
    rows = [{"messages": user("a") + assistant(f"b {i}")} for i in range(4)]
    path, cache = write(tmp_path / "rows.jsonl", rows), RowCache(tmp_path / "prepared", "1")
    form: Any = {"train_on": "all_assistant", "max_length": None, "too_long": "drop"}
    entry: dict[str, Any] = {"path": str(path)}

    def prepared(
        tokenizer: Any = TOKENIZER, place: RowCache = cache, seed: int = 0, more: Any = None, **changes: Any
    ) -> int:
        """How many of the two steps had to be done."""
        mixture = read_sources(
            [DataSource(**{**entry, **(more or {})})], seed, refuse=no_answer, cache=place, refuses_by="sft"
        )
        encoded = encode_rows(mixture.rows, tokenizer, **{**form, **changes}, cache=place)
        return ("reused from" not in mixture.read) + (not encoded.entry.hit)

    other = byte_tokenizer()
    other.add_tokens(["b 1"])
    assert [prepared(), prepared(), prepared(seed=1)] == [2, 0, 0]
    assert prepared(tokenizer=other) == prepared(max_length=30) == prepared(train_on="last_assistant") == 1
    assert prepared(place=RowCache(cache.folder, "2")) == 2
    assert prepared(more={"split": "[:2]"}) == prepared(more={"roles": {"bot": "assistant"}}) == 2
    write(path, rows[1:])
    assert prepared() == 2 and prepared() == 0


@pytest.mark.parametrize("file", ["rows.arrow", "lengths.npy", "contents.json"])
def test_what_is_damaged_is_made_again(tmp_path: Path, file: str) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": user("a") + assistant("b")}])
    cache = RowCache(tmp_path / "prepared", "1")
    form: Any = {"train_on": "all_assistant", "max_length": None, "too_long": "drop", "cache": cache}
    place = encode_rows(read(path, cache).rows, TOKENIZER, **form).entry
    damaged = place.folder / file
    damaged.write_bytes(damaged.read_bytes()[:-3])
    again = encode_rows(read(path, cache).rows, TOKENIZER, **form)
    assert not again.entry.hit and again.entry.folder == place.folder and len(again.data) == 1


def test_a_kill_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    """What it leaves goes when the next one is made."""
    cache = RowCache(tmp_path / "prepared", "1")

    def killed(folder: Path) -> None:
        (folder / "rows.arrow").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        cache.entry("tokens", "key", killed)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = (tmp_path / "prepared").iterdir()
    assert left.name.startswith(PREFIX)
    place = cache.entry("tokens", "key", lambda folder: (folder / "rows.arrow").write_text("whole") and None)
    assert not place.hit and (place.folder / "rows.arrow").read_text() == "whole" and not left.exists()


def test_an_error_keeps_nothing_and_what_another_process_made_meanwhile_is_taken(tmp_path: Path) -> None:
    cache = RowCache(tmp_path / "prepared", "1")

    def fails(folder: Path) -> None:
        (folder / "rows.arrow").write_text("half")
        raise ToolkitError("no row is left")

    with pytest.raises(ToolkitError):
        cache.entry("tokens", "key", fails)

    def overtaken(folder: Path) -> None:
        cache.entry("tokens", "key", lambda other: (other / "rows.arrow").write_text("theirs") and None)
        (folder / "rows.arrow").write_text("ours")

    place = cache.entry("tokens", "key", overtaken)
    assert (place.folder / "rows.arrow").read_text() == "theirs"
    assert [path.name for path in (tmp_path / "prepared").glob("tokens-*")] == [place.folder.name]


def test_where_nothing_can_be_kept_it_says_so_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "prepared").write_text("a file")
    path = write(tmp_path / "rows.jsonl", [{"messages": user("a") + assistant("b")}])
    mixture = read(path, RowCache(tmp_path / "prepared", "1"))
    assert len(mixture.rows) == 1 and "not cached: " in mixture.read and "prepared" in mixture.read


def test_what_others_have_kept_is_read_where_nothing_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a trainer makes of the rows goes to a temporary directory then."""
    path, cache = (
        write(tmp_path / "rows.jsonl", [{"messages": user("a") + assistant("b")}]),
        RowCache(tmp_path / "shared"),
    )
    form: Any = {"train_on": "all_assistant", "max_length": None, "too_long": "drop", "cache": cache}
    encode_rows(read(path, cache).rows, TOKENIZER, **form)
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = sorted((tmp_path / "shared").rglob("*"))
    found = encode_rows(read(path, cache).rows, TOKENIZER, **form)
    assert found.entry.hit and len(found.data.map(lambda row: row, load_from_cache_file=False)) == 1
    assert sorted((tmp_path / "shared").rglob("*")) == before


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": user("a") + assistant("b")}] * 3)

    def changing(row: Any) -> None:
        with path.open("a") as file:
            file.write("\n")

    with pytest.raises(ToolkitError, match="changed while it was read"):
        read_sources(
            [DataSource(path=str(path))], 0, refuse=changing, cache=RowCache(tmp_path / "prepared"), refuses_by=""
        )
    assert not list((tmp_path / "prepared").glob("rows-*"))


def test_many_rows_are_one_call_of_the_tokenizer_and_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, str | None]] = []
    tokenizer, real = byte_tokenizer(), type(TOKENIZER).__call__

    def call(self: Any, texts: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((len(texts), os.environ.get("TOKENIZERS_PARALLELISM")))
        return real(self, texts, *args, **kwargs)

    monkeypatch.setattr(type(TOKENIZER), "__call__", call)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    rows = [{"messages": user(f"a{i}") + assistant("same")} for i in range(100)]
    encode_rows(rows, tokenizer, train_on="all_assistant", max_length=None, too_long="drop")
    assert calls == [(101, "true")] and os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_a_run_tells_the_same_of_rows_that_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A second run, in a directory of its own, reuses the first one's entries; with --no-cache nothing is stored."""
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": user("a") + assistant("b" * 9 * i), "id": i} for i in range(1, 9)]
    write(Path("rows.jsonl"), [*rows, {"messages": []}])
    Path("sft.yaml").write_text(
        "stage: sft\nmodel: {path: base, preset: tiny}\nlora: {targets: [attention], r: 2}\n"
        "data: [{path: rows.jsonl, on_bad_row: skip}]\nformat: {too_long: drop}\n"
        "training: {max_steps: 1, max_length: 30}\noutput_dir: run\n"
    )
    said, rejected = [], []
    for arguments in (["--no-cache"], [], ["output_dir=other"]):
        assert main(["sft", "sft.yaml", *arguments]) == 0
        output = capfd.readouterr()
        said.append([*output.out.splitlines(), *output.err.splitlines()])
        run = Path("other" if "other" in str(arguments) else "run")
        rejected.append((run / "rejected.jsonl").read_text())
        if arguments == ["--no-cache"]:
            assert not Path("runs").exists()
            run.rename("first")
    counted = [
        [line for line in lines if "rows" in line and " in " not in line and "reused" not in line] for lines in said
    ]
    assert len(counted[0]) >= 2 and counted[0] == counted[1] == counted[2] and len(set(rejected)) == 1
    assert [sum("reused from runs/prepared" in line for line in lines) for lines in said] == [0, 0, 2]
    assert [sum("cached in runs/prepared" in line for line in lines) for lines in said] == [0, 2, 0]


def test_a_directory_beside_is_a_processs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "prepared").mkdir()
    here, there = scratch_directory(), scratch_directory(tmp_path / "prepared")
    assert here.parent.parent == tmp_path and there.parent.parent == tmp_path / "prepared"
    remove_scratch()
    assert [path.name for path in tmp_path.rglob("*")] == ["prepared"]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_file_that_changes_between_its_hash_and_its_rows_is_refused(
    keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else other rows would be found under the hash of the old ones."""
    data = write(tmp_path / "a.jsonl", [conversation([("a", "b", None)], {})])

    def hash_then_change(path: Path) -> str:
        sha256 = file_sha256(path)
        write(data, [conversation([("c", "other", None)], {})])
        return sha256

    monkeypatch.setattr("recipes.data.reading.file_sha256", hash_then_change)
    with pytest.raises(ToolkitError, match=r"a\.jsonl has changed while it was read"):
        read(data, RowCache(tmp_path / "kept") if keeps else None)
    assert not [path for path in (tmp_path / "kept").glob("rows-*")]
