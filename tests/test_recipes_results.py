"""Figures, paired comparisons and the table."""

import math
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.files import write_jsonl
from recipes.runs.results import chain_results, figures, outcome_pairs, paired, table_text


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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=60))
def test_pairing_gives_the_mean_change_and_its_error(pairs: list[tuple[float, float]]) -> None:
    before = {row: pair[0] for row, pair in enumerate(pairs)}
    after = {row: pair[1] for row, pair in enumerate(pairs)}
    found = paired(before, {**after, 10**6: 1.0})
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
    lines = table_text(results).splitlines()
    assert any(line.split() == ["rl", "reasoning", "87.6", "%", "50.0", "%"] for line in lines)
    assert "n: exact match 1,000" in lines and "n: pair accuracy 400" in lines
    assert any(line.startswith("helpful") and "97.5 %" in line for line in lines)
    assert any(line.startswith("alignment tax (exact_match, before -> after, paired): T = 1 -100.0") for line in lines)
