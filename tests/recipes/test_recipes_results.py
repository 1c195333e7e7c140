"""Figures, paired comparisons, and their tables for page and terminal."""

import math
import re
from itertools import zip_longest
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.files import write_json, write_jsonl
from recipes.report.report import write_report
from recipes.results.figures import Outcome, chain_results, figures, outcome_pairs, paired
from recipes.results.layout import Cell, Table, as_text
from recipes.results.tables import headline, table_text
from recipes.results.titles import titles_of


def test_figures_have_the_names_of_results_json() -> None:
    metrics = {
        "exact_match": {"n": 1000, "greedy": 0.5, "t1": 0.4},
        "refusal_unsafe": {"n": 500, "greedy": 1.0, "t1": 0.99, "t0.7": 0.98},
    }
    assert figures(metrics) == {
        "exact_match": 0.5, "exact_match_t1": 0.4, "n": 1000,
        "refusal_unsafe": 1.0, "refusal_unsafe_t1": 0.99, "refusal_unsafe_t0.7": 0.98, "refusal_unsafe_n": 500,
    }  # fmt: skip
    assert figures({"pair_accuracy": {"n": 7, "value": 0.9}}) == {"pair_accuracy": 0.9, "n": 7}


def test_a_stated_interval_is_shown_and_is_no_column_of_its_own() -> None:
    measured = {"n": 10, "greedy": 0.5, "greedy_interval": [0.42, 0.58], "t1": 0.4, "t1_interval": [0.3, 0.5]}
    flat = figures({"score": measured, "other": {"n": 10, "greedy": 0.5}})
    assert flat["score_interval"] == [0.42, 0.58] and flat["score_t1_interval"] == [0.3, 0.5]
    shown = table_text({"stages": {"run": flat}})
    assert "42.0 to 58.0" in shown and "30.0 to 50.0" in shown and "interval" not in shown.split("\n")[2].lower()
    assert "23.7 to 76.3" in shown  # Wilson's, where none is stated


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=60))
def test_pairing_gives_the_mean_change_and_its_error(pairs: list[tuple[float, float]]) -> None:
    before = {row: Outcome(pair[0]) for row, pair in enumerate(pairs)}
    after = {row: Outcome(pair[1]) for row, pair in enumerate(pairs)}
    found = paired(before, {**after, 10**6: Outcome(1.0)})
    changes = [b - a for a, b in pairs]
    mean = sum(changes) / len(changes)
    spread = math.sqrt(sum((c - mean) ** 2 for c in changes) / (len(changes) - 1))
    assert found["n"] == len(pairs)
    assert math.isclose(found["difference"], mean, abs_tol=1e-5)
    assert math.isclose(found["standard_error"], spread / math.sqrt(len(pairs)), abs_tol=1e-5)


def test_the_table_shows_every_figure_on_one_line_a_stage(tmp_path: Path) -> None:
    for name, value in (("before", 1.0), ("after", 0.0)):
        rows = [{"task": "exact_match", "decoding": "t1", "row": row, "value": value} for row in range(2)]
        write_jsonl(
            tmp_path / name / "samples.jsonl", [*rows, {"task": "other", "decoding": "t1", "row": 0, "value": 1}]
        )
    change = outcome_pairs(tmp_path / "before", tmp_path / "after", "exact_match")
    assert change == {"t1": {"difference": -1.0, "standard_error": 0.0, "n": 2}}
    results = chain_results(
        7,
        {
            "stages.base": {"exact_match": {"n": 1000, "greedy": 0.001, "t1": 0.0}},
            "stages.rl_reasoning": {"exact_match": {"n": 1000, "greedy": 0.8765, "t1": 0.5}},
            "reward_models.helpful": {"pair_accuracy": {"n": 400, "value": 0.975}},
        },
        {"alignment_tax": {"task": "exact_match", "before": "before", "after": "after", "change": change}},
        seconds=12.34,
        peak_gb=1.5,
    )
    assert list(results) == ["seed", "stages", "reward_models", "alignment_tax", "seconds", "peak_memory_gb"]
    assert results["reward_models"] == {"helpful": {"pair_accuracy": 0.975, "n": 400}}
    recipe = {
        "stages": [
            {"name": "rl_reasoning", "title": "RL stage 1: reasoning"},
            {"name": "after", "results": "stages.rl_reasoning", "model": {"path": "${rl_reasoning}"}},
        ],
        "compare": [{"name": "alignment_tax", "title": "Alignment tax of RL stage 2"}],
    }
    text = table_text(results, titles_of(recipe))
    words = [line.split() for line in text.splitlines()]
    for line in (
        "RL stage 1: reasoning 87.6 % 50.0 %",
        "n = 1,000 n = 1,000",
        "greedy T = 1",
        "helpful 97.5 %",
        "n = 400",
        "base 0.1 % 0.0 %",
        "Alignment tax of RL stage 2 -100.0",
        "Exact match -100.0 to -100.0",
        "before -> RL stage 1: reasoning n = 2",
    ):
        assert line.split() in words
    assert max(map(ord, text)) < 128


def test_a_changed_loss_is_in_nats_and_weighs_rows_as_its_figure_does(tmp_path: Path) -> None:
    losses = {"before": [(2.0, 30), (1.0, 10)], "after": [(1.8, 30), (1.4, 10)]}
    for name, rows in losses.items():
        samples = [
            {"task": "held_out_loss", "decoding": "loss", "row": row, "value": value, "weight": weight}
            for row, (value, weight) in enumerate(rows)
        ]
        write_jsonl(tmp_path / name / "samples.jsonl", samples)
    change = outcome_pairs(tmp_path / "before", tmp_path / "after", "held_out_loss")
    means = {name: sum(v * w for v, w in rows) / 40 for name, rows in losses.items()}
    assert math.isclose(change["loss"]["difference"], means["after"] - means["before"], abs_tol=1e-5)
    error = math.sqrt(2 * ((30 * -0.15) ** 2 + (10 * 0.45) ** 2)) / 40
    assert math.isclose(change["loss"]["standard_error"], error, abs_tol=1e-5)
    comparison = {"task": "held_out_loss", "before": "before", "after": "after", "change": change}
    text = table_text({"gain": comparison})
    assert re.search(r"gain +-0\.050\n.* -0\.491 to \+0\.391\n", text), text
    assert "in nats" in text and "points" not in text
    share = {"greedy": {"difference": 0.5, "standard_error": 0.0, "n": 2}}
    both = table_text({"gain": comparison, "more": {**comparison, "task": "right", "change": share}})
    assert "in nats or percentage points" in both and "+50.0" in both


def test_page_and_terminal_show_the_same_cells(tmp_path: Path) -> None:
    entry = {
        "exact_match": 0.5,
        "exact_match_truncated": 0.25,
        "n": 100,
        "held_out_loss": 1.23456,
        "held_out_loss_n": 7,
    }
    other = {"exact_match": 0.4, "exact_match_t0.7": 0.3, "n": 90, "odd_truncated": 0.125}
    results = {"stages": {"sft": entry, "mine": other}, "targets": {"half": {"target": 0.5, "value": 0.5, "met": True}}}
    write_json(tmp_path / "results.json", results)
    page = re.sub(r"<[^>]*>", " ", write_report([tmp_path]).read_text(encoding="utf-8").split("</style>")[1])
    terminal = table_text(results)
    cells = [cell for table in headline(results) for row in (table.columns, *table.rows) for cell in row]
    shown = [text for cell in cells for text in (cell.text, *cell.minor)]
    for text in (
        "50.0 %",
        "25.0 % cut",
        "n = 100",
        "n = 90",
        "Held out loss",
        "1.235 nats",
        "n = 7",
        "T = 0.7",
        "0.125",
        "met",
    ):
        assert text in shown
    assert all(text in page and text.replace("\u2013", "-") in terminal for text in shown)


CELL = st.tuples(st.text("abc% ", min_size=1, max_size=9).map(str.strip), st.lists(st.text("xyz"), max_size=3))


@given(st.lists(st.tuples(CELL, CELL), max_size=4))
def test_the_columns_of_a_table_as_text_are_straight(rows: list[tuple[tuple[str, list[str]], ...]]) -> None:
    table = Table("t", [Cell("a"), Cell("b")], [[Cell(text, tuple(minor)) for text, minor in row] for row in rows])
    _, _, rule, *lines = as_text(table).split("\n")
    for left, right in rows:
        for before, after in zip_longest((left[0], *left[1]), (right[0], *right[1]), fillvalue=""):
            # What stands on the right ends where the rule ends.
            wanted = before.ljust(len(rule) - len(after)) + after if after else before
            assert lines.pop(0) == wanted and len(wanted) <= len(rule)
    assert not lines
