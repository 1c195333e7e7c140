"""The figures of a reward model, against their definitions written out; RewardBench 2's data and scores."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations import load_conversations
from conversations.answers import intervals
from eval.agreement import agreement, prompts_of, remark
from recipes.cli import main
from recipes.files import read_json

from ..helpers.stages import byte_tokenizer, lines, score_model

SCORES = st.integers(-4, 4).map(lambda value: value / 2)
LENGTHS = st.integers(1, 6)
META = st.sampled_from([None, {"source": "a"}, {"source": "b", "kind": 3}])


@st.composite
def ranked(draw: Any, most: int = 2) -> dict[str, Any]:
    right, wrong = draw(st.integers(1, most - 1)), draw(st.integers(1, most - 1))
    answers = right + wrong
    return {
        "scores": draw(st.lists(SCORES, min_size=answers, max_size=answers)),
        "lengths": draw(st.lists(LENGTHS, min_size=answers, max_size=answers)),
        "right": right,
        "meta": draw(META),
    }


LABELLED = st.fixed_dictionaries(
    {"scores": st.tuples(SCORES), "lengths": st.tuples(LENGTHS), "label": st.booleans(), "meta": META}
)
SCORED = st.fixed_dictionaries(
    {"scores": st.tuples(SCORES), "lengths": st.tuples(LENGTHS), "score": SCORES, "meta": META}
)
ROWS = st.lists(st.one_of(ranked(), ranked(4), LABELLED), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 10)


def details(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: figure["value"] for name, figure in agreement(rows)["details"].items()}


def margins(row: dict[str, Any]) -> list[float]:
    if "label" in row:
        return [row["scores"][0] * (1 if row["label"] else -1)]
    good, bad = row["scores"][: row["right"]], row["scores"][row["right"] :]
    return [a - b for a, b in product(good, bad)]


def mean(values: Any) -> float:
    return sum(values) / len(values) if (values := list(values)) else math.nan


def same(value: float | None, expected: float) -> bool:
    return math.isnan(expected) if value is None else value == pytest.approx(expected, abs=1e-9)


@given(ROWS)
def test_figures_are_their_definitions(rows: list[dict[str, Any]]) -> None:
    found, values = agreement(rows), details(rows)
    assert found["n"] == len(rows)
    assert found["value"] == pytest.approx(mean(mean(m > 0 for m in margins(row)) for row in rows))
    assert values["mean_margin"] == pytest.approx(mean(mean(margins(row)) for row in rows))
    answers = [
        (score, bool(row["label"]) if "label" in row else number < row["right"])
        for row in rows
        for number, score in enumerate(row["scores"])
    ]
    good, bad = ([score for score, right in answers if right is wanted] for wanted in (True, False))
    assert same(values["auc"], mean((a > b) + (a == b) / 2 for a, b in product(good, bad)))
    sizes = [length for row in rows for length in row["lengths"]]
    scores = [score for score, _ in answers]
    flat = len(set(sizes)) == 1 or len(set(scores)) == 1
    assert same(values["length_correlation"], math.nan if flat else float(np.corrcoef(scores, sizes)[0, 1]))
    assert math.isclose(values["calibration_error"], calibration_error(rows), abs_tol=1e-9)


def calibration_error(rows: list[dict[str, Any]]) -> float:
    """Bin by bin: the share of rows in it, times how far the accuracy is from the mean confidence."""
    bins: dict[int, list[tuple[float, float, float]]] = {}
    for row in rows:
        for margin in margins(row):
            sure = 1 / (1 + math.exp(-abs(margin)))
            right = 0.5 if margin == 0 else float(margin > 0)
            bins.setdefault(min(int(20 * (sure - 0.5)), 9), []).append((1 / len(margins(row)), right, sure))
    return sum(
        abs(sum(w * right for w, right, _ in one) - sum(w * sure for w, _, sure in one)) for one in bins.values()
    ) / len(rows)


@given(st.lists(SCORED, min_size=2, max_size=20))
def test_scored_rows_are_compared_with_one_another(rows: list[dict[str, Any]]) -> None:
    pairs = [(a, b) for a, b in product(rows, rows) if a["score"] > b["score"]]
    found = agreement(rows)
    if not pairs:
        assert found["value"] is None
        return
    shares = []
    for row in rows:
        others = [other for other in rows if other["score"] != row["score"]]
        ahead = [(row, other) if row["score"] > other["score"] else (other, row) for other in others]
        shares += [mean(a["scores"][0] > b["scores"][0] for a, b in ahead)] if ahead else []
    assert found["value"] == pytest.approx(mean(shares))
    assert "calibration_error" not in found["details"]


@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=20))
def test_a_model_that_goes_by_length_alone_is_at_chance(sizes: list[tuple[int, int]]) -> None:
    rows = [{"scores": lengths, "lengths": lengths, "right": 1} for lengths in sizes if lengths[0] != lengths[1]]
    signs = {a > b for a, b in sizes if a != b}
    if len(signs) == 2:
        assert details(rows)["length_controlled"] == 0.5
        assert details(rows)["length_correlation"] == pytest.approx(1)


def test_length_is_named_in_the_summary_when_scores_go_with_it() -> None:
    rows = [{"scores": (float(n), -float(n)), "lengths": (n + 1, 1), "right": 1} for n in range(9)]
    assert "rise with length" in remark(agreement(rows))
    assert "fall with length" in remark(agreement([{**row, "lengths": (1, row["lengths"][0])} for row in rows]))
    assert not remark({"details": {"length_correlation": {"value": 0.3}}}) and not remark({"n": 1})


@given(st.lists(ranked(4), min_size=1, max_size=8))
def test_best_of_n_credits_the_highest_score(rows: list[dict[str, Any]]) -> None:
    values = details(rows)
    for size in range(3, 7):
        asked = [row for row in rows if len(row["scores"]) == size]
        credit = []
        for row in asked:
            top = [number for number, score in enumerate(row["scores"]) if score == max(row["scores"])]
            credit.append(mean(number < row["right"] for number in top))
        assert (f"best_of_{size}" in values) == bool(asked)
        assert not asked or values[f"best_of_{size}"] == pytest.approx(mean(credit))


def tie(name: str, right: list[float], wrong: list[float]) -> dict[str, Any]:
    scores = [*right, *wrong]
    return {"scores": scores, "lengths": [1] * len(scores), "right": len(right), "meta": {"id": name}}


def test_ties_are_scored_as_rewardbench_2_does() -> None:
    rows = [
        tie("ref:0", [3.0], [0.0, 1.0]), tie("tied:0", [3.0, 2.5], [1.0, 0.0]),  # all right: margins 2 and 1.5 over 0.5
        tie("ref:1", [1.0], [0.5]), tie("tied:1", [5.0, 3.0], [2.0]),  # a spread of 2 above margins of 0.5 and 1
        tie("ref:2", [0.0], [1.0]), tie("tied:2", [2.0, 2.0], [1.0]),  # no spread: -1 / 0
    ]  # fmt: skip
    extra = (math.tanh(1.5 / 0.5 - 1) + math.tanh(0.5 / 2 - 1) - 1) / 3
    assert details(rows)["ties"] == pytest.approx(0.3 * 1 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * extra)
    assert "best_of_3" not in details(rows) and "ties" not in details(rows[::2])


def test_groups_by_source_and_kind() -> None:
    row = {"lengths": (1, 1), "right": 1}
    rows = [
        {**row, "scores": (1.0, 0.0), "meta": {"source": "a", "kind": 1}},
        {**row, "scores": (0.0, 1.0), "meta": {"source": "b"}},
        {**row, "scores": (1.0, 0.0)},
    ]
    found = agreement(rows)
    assert {name: figure["value"] for name, figure in found["by_source"].items()} == {"a": 1, "b": 0, "not stated": 1}
    assert {name: figure["n"] for name, figure in found["by_kind"].items()} == {"1": 1, "not stated": 2}
    assert "by_source" not in agreement(rows[2:])


@given(ROWS)
def test_intervals_hold_their_values_or_are_left_out(rows: list[dict[str, Any]]) -> None:
    """And nothing that JSON lacks (NaN) is among the figures."""
    json.dumps(agreement(rows), allow_nan=False)
    interval = agreement(rows)["details"]["mean_margin"]["interval"]
    assert interval is None if len(set(prompts_of(rows))) == 1 else interval[0] <= interval[1]


BENCH = [
    {"id": f"{n}", "prompt": f"{n} + 1?", "chosen": [str(n + 1)], "rejected": ["a", "b", "c"], "subset": "Math"}
    for n in range(4)
] + [
    {"id": f"{name}:0", "prompt": "a colour", "chosen": ["red", "blue"][: 1 + (name == "tied")], "rejected": ["7", "8"]}
    for name in ("ref", "tied")
]  # fmt: skip
LABELS = [{"prompt": f"{n}?", "completion": "x" * n, "label": n % 2} for n in range(1, 5)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rewardbench_2_rows_are_read(tmp_path: Path) -> None:
    rows = list(load_conversations(write_rows(tmp_path / "bench.jsonl", BENCH)))
    assert [answer[0]["content"] for answer in rows[-1]["right_answers"]] == ["red", "blue"]
    assert rows[0]["meta"] == {"id": "0", "subset": "Math"} and len(rows[0]["wrong_answers"]) == 3
    twice = {**BENCH[0], "rejected": ["1", "b"]}
    with pytest.raises(ValueError, match="same answer is among the right and the wrong"):
        list(load_conversations(write_rows(tmp_path / "twice.jsonl", [twice])))


def test_the_command_on_every_kind_of_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    score_model().eval().save_pretrained("rm")
    byte_tokenizer().save_pretrained("rm")
    pairs = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no, never", "source": "ab"[n % 2]} for n in range(4)]
    scored = [{"prompt": f"{n}", "completion": "x" * n, "score": n} for n in range(1, 5)]
    files = {"bench": BENCH, "labels": LABELS, "pairs": pairs, "scores": scored}
    for name, rows in files.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    tasks = [{"name": name, "metric": "reward", "data": [{"path": f"{name}.jsonl"}]} for name in files]
    recipe = {"stage": "eval", "model": {"path": "rm"}, "tasks": tasks, "output_dir": "run"}
    Path("e.yaml").write_text(json.dumps(recipe))
    assert main(["eval", "e.yaml"]) == 0
    results, said = read_json(Path("run/results.json")), lines(Path("run/samples.jsonl"))
    assert results["bench_details"].keys() > {"best_of_4", "ties"} and results["labels_n"] == 4
    assert results["pairs_by_source"]["a"]["n"] == 2 and results["scores_details"]["auc"]["interval"]
    mine = [line for line in said if line["task"] == "pairs"]
    assert [line["lengths"] for line in mine] == [[5, 11]] * 4  # bytes with the space before and the end token behind
    assert results["pairs"] == sum(line["scores"][0] > line["scores"][1] for line in mine) / 4
    shown = capsys.readouterr().out + capsys.readouterr().err
    assert "Bench details" in shown and "Length correlation" in shown and "Pairs by source" in shown
    assert main(["report", "run"]) == 0
    page = Path("run/report.html").read_text()
    assert "Bench details" in page and "Length controlled" in page


def test_rows_without_a_verdict_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    score_model().eval().save_pretrained("rm")
    byte_tokenizer().save_pretrained("rm")
    write_rows(tmp_path / "chat.jsonl", [{"prompt": "a", "completion": "b"}])
    tasks = [{"name": "a", "metric": "reward", "data": [{"path": "chat.jsonl"}]}]
    Path("e.yaml").write_text(json.dumps({"stage": "eval", "model": {"path": "rm"}, "tasks": tasks}))
    assert main(["eval", "e.yaml", "output_dir=run"]) == 2
    assert "is a conversation, not a pair and not an answer with a label or a score" in capsys.readouterr().err
