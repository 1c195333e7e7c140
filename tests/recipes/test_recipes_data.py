"""Data entries: files, generated data, hub data sets, mixtures by weight, rows left out."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations.errors import ToolkitError
from conversations.sections import DataSource
from recipes.data.mixing import chosen, rows_used
from recipes.data.sources import read_sources
from recipes.data.splits import Split, parse_split, place


def source(**fields: Any) -> DataSource:
    return DataSource.model_validate(fields)


def write_rows(path: Path, *names: str) -> str:
    lines = [json.dumps({"prompt": name, "completion": "yes"}) + "\n" for name in names]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def prompts(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    weights=st.lists(st.none() | st.floats(0.05, 8), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_sources_stand_to_one_another_as_their_weights(
    sizes: list[int], weights: list[float | None], seed: int
) -> None:
    weights = weights[: len(sizes)]
    counts = rows_used(sizes, weights)
    if all(weight is None for weight in weights):
        assert counts == sizes
        return
    shares = [weight or 1.0 for weight in weights]
    main = max(range(len(sizes)), key=lambda i: (shares[i], sizes[i]))
    assert counts[main] == sizes[main]  # of the heaviest source nothing is left out and nothing repeated
    for used, share in zip(counts, shares, strict=True):
        assert abs(used - counts[main] * share / shares[main]) <= 0.5 or used == 1
    for size, used in zip(sizes, counts, strict=True):
        drawn = Counter(chosen(size, used, random.Random(seed)))
        often = [drawn[row] for row in range(size)]
        assert sum(often) == used and max(often) - min(often) <= 1
        assert Counter(chosen(size, used, random.Random(seed))) == drawn


def test_helpful_and_safety_as_four_to_one(tmp_path: Path) -> None:
    helpful = write_rows(tmp_path / "helpful.jsonl", *(f"h{i}" for i in range(40)))
    safety = write_rows(tmp_path / "safety.jsonl", *(f"s{i}" for i in range(4)))
    mixture = read_sources([source(path=helpful, weight=4.0), source(path=safety, weight=1.0)], seed=0)
    used = Counter(prompts(mixture.rows))
    assert sum(used[f"h{i}"] for i in range(40)) == 40 and [used[f"s{i}"] for i in range(4)].count(3) == 2
    assert mixture.lines[-2:] == [
        "helpful.jsonl: 40 of 40 rows used, 80.0 % of the mixture",
        "safety.jsonl: 4 rows used 2.5 times each, 20.0 % of the mixture",
    ]
    assert [mixture.rows.source_of(i) for i in range(50)] == [int(name[0] == "s") for name in prompts(mixture.rows)]


def test_one_source_keeps_its_order_and_several_are_mixed_by_seed(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", *"abcdefgh")
    b = write_rows(tmp_path / "b.jsonl", *"ABCDEFGH")
    one = read_sources([source(path=a)], seed=0)
    assert prompts(one.rows) == list("abcdefgh")
    entries = [source(path=a), source(path=b, weight=0.5)]
    mixed = read_sources(entries, seed=0)
    order = prompts(mixed.rows)
    assert set("abcdefgh") <= set(order) and len(order) == 12 and order[:8] != list("abcdefgh")
    assert prompts(read_sources(entries, seed=0).rows) == order != prompts(read_sources(entries, seed=1).rows)
    assert [(file["rows"], file["used"]) for file in mixed.files] == [(8, 8), (8, 4)]
    assert "b.jsonl: 4 of 8 rows used, 33.3 % of the mixture" in mixed.lines


def test_a_part_of_a_source_is_a_seeded_sample_of_all_of_it(tmp_path: Path) -> None:
    """The first rows of a file are often of one kind."""
    entries = [
        source(path=write_rows(tmp_path / "a.jsonl", *(f"a{i}" for i in range(100)))),
        source(path=write_rows(tmp_path / "b.jsonl", *(f"b{i}" for i in range(100))), weight=0.2),
    ]
    samples = [
        {int(name[1:]) for name in prompts(read_sources(entries, seed=seed).rows) if name[0] == "b"}
        for seed in range(5)
    ]
    assert all(len(sample) == 20 for sample in samples)
    assert len(set.union(*samples)) > 50
    assert all(len(sample & set(range(50))) not in (0, 20) for sample in samples)


def test_rows_left_out_are_kept_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": true, "completion": "b"}\n', encoding="utf-8")
    with pytest.raises(ToolkitError, match=r"a\.jsonl:2"):
        read_sources([source(path=str(path))], seed=0)
    mixture = read_sources([source(path=str(path), on_bad_row="skip")], seed=0)
    assert len(mixture.rows) == 1
    assert [(row.line, row.file) for row in mixture.rejected] == [(2, str(path))]
    with pytest.raises(ToolkitError, match="max_bad_rows"):
        read_sources([source(path=str(path), on_bad_row="skip", max_bad_rows=0)], seed=0)


def test_generated_data_follows_the_recipes_seed_unless_it_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [list(read_sources([source(path="tiny:test_safe?n=5")], seed=seed).rows) for seed in (1, 2, 1)]
    assert rows[0] == rows[2] != rows[1] and len(rows[0]) == 5
    assert list(read_sources([source(path="tiny:test_safe?seed=2&n=5")], seed=1).rows) == rows[1]
    assert (tmp_path / "runs" / "tiny" / "data" / "seed-2").is_dir()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "tiny:nothing"}, "nothing"),
        ({"path": "tiny:test_safe?m=3"}, "data.0.path: 'tiny:test_safe?m=3' is not tiny:NAME"),
        ({"path": "tiny:test_safe?n=x"}, "is not tiny:NAME"),
        ({"path": "missing.jsonl"}, "data.0.path: no such file: missing.jsonl"),
        ({"path": "rows.jsonl", "split": "test"}, "data.0.split: rows.jsonl has no splits by name; 'test' is for hub"),
        ({"path": "rows.jsonl", "split": "[1:]"}, "data.0.split: no row of rows.jsonl falls into '[1:]'"),
        ({"path": "rows.jsonl", "split": "train[9"}, "data.0.split: 'train[9' is not NAME, NAME[:100] or NAME[:90%]"),
        ({"path": "rows.jsonl", "split": "[10%:20]"}, "mixes rows and percent"),
        ({"path": "rows.jsonl", "split": "[50%:50%]"}, "selects nothing"),
        ({"path": "rows.jsonl", "split": "[7:7]"}, "selects nothing"),
        ({"path": "tiny:test_safe?n=5", "split": "test"}, "has no splits by name"),
        ({"path": "rows.jsonl", "fim": {"rate": 0.5}}, "rows.jsonl:1: fim is for rows of plain text"),
        ({"path": "empty.jsonl"}, "empty.jsonl: no rows"),
        ({"path": "rows.txt"}, "rows.txt"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", "a")
    write_rows(tmp_path / "rows.txt", "a")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ToolkitError) as caught:
        read_sources([source(**fields)], seed=0)
    assert message in str(caught.value)


def test_a_hub_data_set_is_streamed_once_and_read_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((name, config, split, streaming))
        if name == "owner/missing":
            raise FileNotFoundError("not on the hub")
        return ({"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in count())  # more than memory holds

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = source(path="openai/gsm8k:main", split="test[2:4]")
    rows = [list(read_sources([entry], seed=0).rows) for _ in range(2)]
    assert asked == [("openai/gsm8k", "main", "test", True)]
    assert rows[0] == rows[1] and [row["reference"] for row in rows[0]] == ["3", "4"]
    with pytest.raises(ToolkitError, match=r"data\.0\.path: no file owner/missing, and no hub data set"):
        read_sources([source(path="owner/missing")], seed=0)


def test_a_hub_data_set_goes_through_datasets_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own builder and stream, on a folder in place of the hub."""
    import datasets

    folder = tmp_path / "repository"
    folder.mkdir()
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = {"messages": [messages] * 9, "when": [datetime(2024, 5, 7)] * 9}
    for name in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{name}.parquet")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **kwargs: load(str(folder), *args, **kwargs))
    monkeypatch.chdir(tmp_path)
    found = list(read_sources([source(path="owner/name", split="test[2:5]")], seed=0).rows)
    assert [row["messages"] for row in found] == [messages] * 3
    with pytest.raises(ToolkitError, match=r"data\.0\.path: .*Available splits: \['train', 'test'\]"):
        read_sources([source(path="owner/name", split="validation")], seed=0)


def test_shares_of_a_hub_data_set_are_parts_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(60)]
    asked: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **_: asked.append(names) or iter(rows))
    parts = [read_sources([source(path="owner/name", split=f"train[{end}]")], 0).rows for end in (":80%", "80%:")]
    assert len(asked) == 1 and sorted(prompts([*parts[0], *parts[1]])) == sorted(row["prompt"] for row in rows)


@given(share=st.integers(1, 99), questions=st.lists(st.text(max_size=3).map("q".__add__), min_size=30, max_size=60))
def test_a_split_never_parts_a_conversation(share: int, questions: list[str]) -> None:
    """Rows that begin with one question are on one side, whatever follows it and whatever their order."""
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": str(number)}]}
        for number, text in enumerate(questions)
    ]
    parts = [parse_split(f"train[{end}]", "split") for end in (f":{share}%", f"{share}%:")]
    first, second = ([row["messages"][0]["content"] for row in part.select(iter(rows))] for part in parts)
    assert not set(first) & set(second) and sorted(first + second) == sorted(questions)
    again = parts[0].select(iter(rows[::-1]))
    assert sorted(row["messages"][0]["content"] for row in again) == sorted(first)


@pytest.mark.parametrize(
    ("text", "split"),
    [
        (None, Split()),
        ("", Split()),
        ("test", Split("test")),
        ("a.b-c_1[3:]", Split("a.b-c_1", rows=(3, None))),
        ("[:3]", Split(rows=(0, 3))),
        ("[2:3]", Split(rows=(2, 3))),
        ("[:]", Split(rows=(0, None))),
        ("x[5%:]", Split("x", shares=(0.05, 1.0))),
        ("[:12.5%]", Split(shares=(0.0, 0.125))),
        ("[0%:100%]", Split(shares=(0.0, 1.0))),
    ],
)
def test_splits_that_are_read(text: str | None, split: Split) -> None:
    assert parse_split(text, "split") == split


@pytest.mark.parametrize(
    "text", ["[3:2]", "[0:0]", "[60%:50%]", "[:101%]", "[:0%]", "[5:50%]", "[5%:50]", "[-1:]", "[1]"]
)
def test_splits_that_are_not(text: str) -> None:
    with pytest.raises(ToolkitError, match=r"data\.3\.split"):
        parse_split(text, "data.3.split")


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ("[:10]", "[10:20]", False),
        ("[:11]", "[10:20]", True),
        ("[:10]", "[10:]", False),
        ("[5:]", "[10:]", True),
        ("[12:15]", "[10:20]", True),
        ("[:50%]", "[50%:]", False),
        ("[:51%]", "[50%:]", True),
        ("[:10]", "[50%:]", True),  # by number and by hash
        ("", "[:10]", True),
    ],
)
def test_splits_meet_where_they_may_have_a_row_in_common(one: str, other: str, meet: bool) -> None:
    splits = parse_split(one, "one"), parse_split(other, "other")
    assert splits[0].meets(splits[1]) == splits[1].meets(splits[0]) == meet


def test_the_place_of_a_row_is_the_same_for_ever() -> None:
    """Or what was held out yesterday is trained on tomorrow. It goes by the first question, if there is one."""
    ask = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
    system = [{"role": "system", "content": "S"}]
    rows = [{"text": "Q"}, {"messages": ask}, {"messages": [*system, *ask[:2]]}, {"prompt": ask[:1], "chosen": []}]
    assert {place(row) for row in rows} == {0.2926038175214036}
    assert place({"messages": system}) == place({"text": ""}) == 0.8894159948913374


def test_the_parts_of_a_split_are_about_as_large_as_they_say() -> None:
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "chosen": [], "rejected": []} for i in range(2000)]
    assert len(list(parse_split("[:90%]", "split").select(iter(rows)))) == pytest.approx(1800, abs=40)
    assert len(list(parse_split("[99.5%:]", "split").select(iter(rows)))) == pytest.approx(10, abs=8)
    assert list(parse_split("train[3:5]", "split").select(iter(rows))) == rows[3:5]


def test_rows_that_the_stage_has_no_use_for_are_bad_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", "one", "two")
    with pytest.raises(ToolkitError, match=r"a\.jsonl:1: no two") as caught:
        read_sources([source(path=path)], seed=0, refuse=lambda row: "no two" if "one" in prompts([row]) else None)
    assert "1 of 2 rows cannot be used" in str(caught.value)


def test_a_mixture_is_read_in_any_order(tmp_path: Path) -> None:
    names = [f"{i} 你好 \U0001f642 \n" for i in range(50)]
    entries = [source(path=write_rows(tmp_path / f"{k}.jsonl", *names)) for k in "ab"]
    inside = list(read_sources(entries, seed=0).rows)
    mixture = read_sources(entries, seed=0)
    assert list(mixture.rows) == inside and mixture.rows[-1] == inside[-1] and mixture.rows[3:5] == inside[3:5]
    assert {row["origin"] for row in inside} == {f"{k}.jsonl:{line}" for k in "ab" for line in range(1, 51)}


def test_fill_in_the_middle_is_seeded_and_as_frequent_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"text": f"def f{i}(): pass"}) + "\n" for i in range(400)), encoding="utf-8")
    entry = source(path=str(path), fim={"rate": 0.5, "mode": "psm"})
    rows = [list(read_sources([entry], seed=seed).rows) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    filled = [row["fim"] for row in rows[0] if "fim" in row]
    assert len(filled) == pytest.approx(200, abs=40)
    assert all(0 <= fim["start"] <= fim["end"] <= 17 and fim["mode"] == "psm" for fim in filled)


def test_a_share_of_bad_rows_counts_in_a_split_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good, bad = '{"prompt": "a", "completion": "b"}\n', '{"prompt": true, "completion": "b"}\n'
    path.write_text((good + bad) * 20, encoding="utf-8")
    with pytest.raises(ToolkitError, match=r"max_bad_rows = 0\.01"):
        read_sources([source(path=str(path), split="[:10]", on_bad_row="skip", max_bad_rows=0.01)], seed=0)
