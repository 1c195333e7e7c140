"""Data entries: files, generated data, hub data sets, mixtures by weight, rows left out."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations.errors import ToolkitError
from conversations.sections import DataSource
from recipes.data import read_sources, weighted


def source(**fields: Any) -> DataSource:
    return DataSource.model_validate(fields)


def write_rows(path: Path, *names: str) -> str:
    lines = [json.dumps({"prompt": name, "completion": "yes"}) + "\n" for name in names]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def prompts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), weight=st.floats(0.01, 4), seed=st.integers(0, 99))
def test_a_weight_says_how_often_each_row_counts(n: int, weight: float, seed: int) -> None:
    rows = [{"id": i} for i in range(n)]
    used = Counter(row["id"] for row in weighted(rows, weight, random.Random(seed)))
    counts = [used[i] for i in range(n)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == round(weight % 1 * n) + int(weight) * n or (weight < 1 and sum(counts) == 1)
    again = Counter(row["id"] for row in weighted(rows, weight, random.Random(seed)))
    assert again == used


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


def test_rows_left_out_are_kept_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}\n', encoding="utf-8")
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
    rows = [read_sources([source(path="tiny:test_safe?n=5")], seed=seed).rows for seed in (1, 2, 1)]
    assert rows[0] == rows[2] != rows[1] and len(rows[0]) == 5
    assert read_sources([source(path="tiny:test_safe?seed=2&n=5")], seed=1).rows == rows[1]
    assert (tmp_path / "runs" / "tiny" / "data" / "seed-2").is_dir()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "tiny:nothing"}, "nothing"),
        ({"path": "tiny:test_safe?m=3"}, "data.0.path: 'tiny:test_safe?m=3' is not tiny:NAME"),
        ({"path": "tiny:test_safe?n=x"}, "is not tiny:NAME"),
        ({"path": "missing.jsonl"}, "data.0.path: no such file: missing.jsonl"),
        ({"path": "rows.jsonl", "split": "train"}, "data.0.split: 'train' is for hub data sets"),
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


def test_a_hub_data_set_is_written_once_and_read_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        if name == "owner/missing":
            raise FileNotFoundError("not on the hub")
        return [{"question": "1 + 1?", "answer": "#### 2"}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = source(path="openai/gsm8k:main", split="test[:1]")
    rows = [read_sources([entry], seed=0).rows for _ in range(2)]
    assert asked == [("openai/gsm8k", "main", "test[:1]")]
    assert rows[0] == rows[1] and rows[0][0]["reference"] == "2"
    with pytest.raises(ToolkitError, match=r"data\.0\.path: no file owner/missing, and no hub data set"):
        read_sources([source(path="owner/missing")], seed=0)
