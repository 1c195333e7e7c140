"""benchmarks/against_stock.py at toy size, and that docs/speed.md has its table as the script makes it."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import against_stock
from benchmarks.common import RESULTS

ROOT = Path(__file__).resolve().parents[2]
TRAINING = "LoRA step with checkpointing, bf16, 4 x 2,048"
DECODING = "decoding, bf16, batch 1 at 128 tokens"


@pytest.mark.parametrize("name", [TRAINING, DECODING])
def test_both_sides_compute_the_same_and_make_a_row(name: str, monkeypatch, capsys):
    runs: dict[str, list[dict[str, float]]] = {}
    computed = {}
    for side in against_stock.SIDES:
        monkeypatch.setattr(sys, "argv", ["against_stock", "--toy", "--only", name, "--side", side])
        against_stock.main()
        found = json.loads(capsys.readouterr().out)
        runs[side], computed[side] = [found["speed"]], found["computed"]
    against_stock.compare(name, computed["ours"], computed["stock"])
    assert f"| {name} | " in against_stock.table({name: runs})
    key = next(iter(computed["ours"]))
    with pytest.raises(SystemExit, match=f"do not compute the same: {key}"):
        against_stock.compare(name, {**computed["ours"], key: computed["stock"][key] * 1.1}, computed["stock"])


def test_the_table_of_the_docs_is_the_one_that_was_measured():
    results = json.loads((RESULTS / "against_stock.json").read_text())
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert against_stock.MARKS[0] + against_stock.page_text(results) + against_stock.MARKS[1] in page
    assert results["runs"].keys() <= against_stock.CASES.keys()
