"""`dsv2 check`: figures that are those of the run, and a page in which nothing from data is markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import pack_dataset

from deepseek_v2_modeling.training import arguments
from recipes.check.check import check
from recipes.check.histogram import bins, text_lines
from recipes.cli import main
from recipes.data.sources import read_sources
from recipes.plan import measure
from recipes.plan.measure import packs
from recipes.recipe.loader import load_recipe
from recipes.runs.preset_tokenizer import build_tokenizer
from sft.data import IGNORED, encode_rows


def conversations(n: int, size: int = 3) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + 1? " + "1" * (i % size), "completion": f"{i + 1}"} for i in range(n)]


def recipe(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "stage": "sft",
        "model": {"path": "nowhere/base", "preset": "tiny"},
        "data": [{"path": "rows.jsonl"}],
        "output_dir": "out/run",
        "training": {"max_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        **changes,
    }
    (folder / "recipe.yaml").write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return folder / "recipe.yaml"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.marked: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if "mark" in self._open:
            self.marked.append(data)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packs_are_those_of_trl(lengths: list[int]) -> None:
    data = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    assert packs(lengths, 20) == len(pack_dataset(data, 20, "bfd"))


def test_rows_are_packed_a_thousand_at_a_time() -> None:
    assert packs([7] * 1000 + [3] * 1000, 10) == 1000 + 334


def test_the_figures_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, conversations(30, 40), format={"too_long": "drop"}, training={"max_length": 30})
    check(load_recipe(path))
    said = capsys.readouterr().out
    loaded = load_recipe(path).recipe
    data, report, _ = encode_rows(
        read_sources(loaded.data, 0).rows,
        build_tokenizer("tiny"),
        train_on="all_assistant",
        max_length=30,
        too_long="drop",
    )
    tokens = sum(len(row["input_ids"]) for row in data)
    trained = sum(label != IGNORED for row in data for label in row["labels"])
    assert 0 < len(report.rejected) < 30
    assert f"rows.jsonl: {tokens:,} tokens in 30 rows, {trained:,} of them trained" in said
    assert f"30 rows; {len(report.rejected)} dropped (longer than 30 tokens); format.too_long is drop" in said
    assert f"{-(-len(data) // 8)} per epoch of {tokens:,} tokens; 3.00 epochs" in said
    assert "rows.jsonl: prompt/completion, 30 rows" in said and "histogram" in said
    assert re.search(r"example 1 \(rows\.jsonl:1; .*⟦ 1<｜end▁of▁sentence｜>⟧", said, re.DOTALL)
    assert not (tmp_path / "out" / "run").exists() and not (tmp_path / "nowhere").exists()


def test_dtype_of_large_products_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"path": "nowhere/base", "preset": "tiny", "dtype": "bfloat16"}
    path = recipe(tmp_path, conversations(8), model=model, training={"max_length": 64, "use_cpu": True})
    for slow, products in ((True, "float32, which is faster"), (False, "bfloat16, which is faster")):
        monkeypatch.setattr(arguments, "float32_is_faster", lambda answer=slow: answer)
        check(load_recipe(path))
        line = rf"training: bfloat16 on the CPU \(\d+ threads?\); large products in {products}"
        assert re.search(line, capsys.readouterr().out)


def test_packing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(load_recipe(recipe(tmp_path, conversations(40), training={"max_length": 64, "packing": True})))
    match = re.search(r"per epoch of (\d+) tokens, (\d+) packs ([\d.]+) % full", capsys.readouterr().out)
    assert match is not None
    assert float(match[3]) == pytest.approx(100 * int(match[1]) / (64 * int(match[2])), abs=0.06)


def test_of_many_rows_a_sample_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, conversations(90))
    check(load_recipe(path))
    exact = re.search(r"rows.jsonl: (\d[\d,]*) tokens", capsys.readouterr().out)
    monkeypatch.setattr(measure, "_BUDGET", 3000)
    check(load_recipe(path))
    said = capsys.readouterr().out
    about = re.search(r"rows.jsonl: about (\d[\d,]*) tokens in 90 rows", said)
    assert exact and about and "estimates from 1 row in" in said and "training: about" in said
    assert re.search(r"of the sample: \d+ rows, none too long; format.too_long is truncate", said)
    assert int(about[1].replace(",", "")) == pytest.approx(int(exact[1].replace(",", "")), rel=0.1)


def test_the_page_shows_what_is_trained_and_escapes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = '<script>alert(1)</script> & "quotes" </style> \u202e'
    rows = [{"prompt": evil + "?", "completion": f"said {evil}", "kind": evil}]
    path = recipe(tmp_path, rows, eval_data=[{"path": "rows.jsonl"}], training={"max_length": 512})
    assert main(["check", str(path)]) == 0
    text = (tmp_path / "out" / "run.check.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert "script" not in page.tags and page.tags.count("svg") == 2 and "\u202e" not in text
    shown = evil.replace("\u202e", "\ufffd")
    assert f" said {shown}<｜end▁of▁sentence｜>" in page.marked and f"User: {shown}?" in page.text
    assert not re.search(r"(?:src|href)=", text)
    said = capsys.readouterr().out
    assert "\u202e" not in said and r"</style> \u202e" in said  # nor does it turn the terminal's text round


def test_bad_rows_and_missing_fill_in_tokens_end_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, [{"prompt": "only a question"}])
    assert main(["check", str(path)]) == 2
    assert "rows.jsonl:1: has no answer to train on" in capsys.readouterr().err
    path = recipe(tmp_path, [{"text": "def f(): pass"}], data=[{"path": "rows.jsonl", "fim": {}}])
    assert main(["check", str(path)]) == 0
    monkeypatch.setattr("conversations.rendering.fill_in_the_middle.TOKENS", {"hole": "<no such token>"})
    assert main(["check", str(path)]) == 2
    assert "the tokenizer has no <no such token>" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run").exists()


@pytest.mark.parametrize(
    ("changes", "row", "reason"),
    [
        ({"stage": "reward"}, {"prompt": "Q", "completion": "A"}, "is a conversation, not a pair of chosen and"),
        ({"stage": "reward", "loss": "pointwise"}, {"prompt": "Q", "chosen": "A", "rejected": "B"}, "is a pair, not"),
        ({"stage": "rl", "rewards": [{"rule": "format"}]}, {"text": "T"}, "is plain text and contains no question"),
        ({"stage": "eval", "tasks": [{"name": "a", "metric": "exact_match"}]}, {"prompt": "Q"}, "has no reference to"),
        ({"stage": "sft"}, {"prompt": "Q", "completion": "A", "label": True}, "is a judged answer, not a conversation"),
    ],
)
def test_rows_of_no_use_to_the_stage_are_bad_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, row: Any, reason: str
) -> None:
    path = recipe(tmp_path, [row], **changes, training={})
    if changes["stage"] == "eval":
        tree = json.loads(path.read_text())
        del tree["training"]
        path.write_text(json.dumps(tree))
    assert main(["check", str(path)]) == 2
    assert f"rows.jsonl:1: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "score": 2}, "score"),
        ({"prompt": "Q", "completion": "A", "label": "law"}, "label"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "chosen"),
    ],
)
def test_a_row_with_a_verdict_brings_the_columns_that_train_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, columns: str
) -> None:
    assert main(["check", str(recipe(tmp_path, [row]))]) == 2
    told = re.search(rf"columns: \{{(\w+): {columns}\}}", capsys.readouterr().err)
    assert told is not None
    path = recipe(tmp_path, [row], data=[{"path": "rows.jsonl", "columns": {told[1]: columns}}])
    assert main(["check", str(path)]) == 0
    reward = recipe(tmp_path, [row, {"messages": 1}], stage="reward", training={})
    assert main(["check", str(reward)]) == 2
    assert "plain conversations" not in capsys.readouterr().err  # for which a reward model has no use


def test_answers_cut_away_whole_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*conversations(3), {"prompt": "What? " * 90, "completion": "A"}, {"prompt": "Q", "completion": "A " * 90}]
    check(load_recipe(recipe(tmp_path, rows)))
    told = "5 rows; 1 truncated to 64 tokens; 1 dropped (answer cut off entirely)"
    assert told in capsys.readouterr().out
    assert told in (tmp_path / "out" / "run.check.html").read_text(encoding="utf-8")
    assert main(["check", str(recipe(tmp_path, rows[3:4]))]) == 2
    told = capsys.readouterr().err
    assert "no row is left to train on: 1 row; 1 dropped (answer cut off entirely); the shortest row has" in told
    assert "tokens: raise training.max_length" in told


def test_each_source_has_an_example_and_one_that_was_cut_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, answer in (("a", "1"), ("b", "1" * 90)):
        line = json.dumps({"prompt": name, "completion": answer}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(line * 5, encoding="utf-8")
    splits = {"a[:3]": "a", "a[3:]": "a", "b": "b"}
    data = [{"path": f"{name}.jsonl", "split": split[1:] or None} for split, name in splits.items()]
    check(load_recipe(recipe(tmp_path, [], data=data)))
    said = capsys.readouterr().out
    titles = re.findall(r"example \d \((.*);", said)
    assert sorted(re.sub(r":\d", "", title) for title in titles) == ["a.jsonl", "a.jsonl", "b.jsonl, part of 96 tokens"]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_every_row_is_in_the_histogram(lengths: list[int]) -> None:
    found = bins(lengths)
    assert sum(each.rows for each in found) == len(lengths) and len(found) <= 13
    assert all(each.rows == sum(each.low <= length <= each.high for length in lengths) for each in found)
    assert len({line.rindex(" ") for line in text_lines(found)}) == 1
