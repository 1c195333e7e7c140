"""Benchmarks at toy size, and that docs/speed.md has its table as benchmarks/against_stock.py makes it."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import against_stock, growth, preparation, trips
from benchmarks.common import RESULTS
from deepseek_v2_modeling import apply_lora, lora_config
from deepseek_v2_modeling.loading import load_base, load_tokenizer, resolve_source, save_directory
from recipes.runs import caching
from recipes.runs.preset_tokenizer import build_tokenizer

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
    with pytest.raises(SystemExit, match=f"the sides differ: {key}"):
        against_stock.compare(name, {**computed["ours"], key: computed["stock"][key] * 1.1}, computed["stock"])


def test_the_table_of_the_docs_is_the_one_that_was_measured():
    results = json.loads((RESULTS / "against_stock.json").read_text())
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert against_stock.MARKS[0] + against_stock.page_text(results) + against_stock.MARKS[1] in page
    assert results["runs"].keys() <= against_stock.CASES.keys()


def test_curves_are_measured_and_what_bends_lies_off_its_law(monkeypatch, capsys):
    names = ["over context", "over checkpoint", "over metric lines"]
    monkeypatch.setattr(sys, "argv", ["growth", "--toy", "--only", *names])
    growth.main()
    table = capsys.readouterr().out
    assert all(any(name in line for line in table.splitlines() if line.startswith("| ")) for name in names)
    sizes = [float(x) for x in (1, 10, 100)]
    straight = growth.fitted([{"x": x, "seconds": 2 + 3 * x} for x in sizes], flat=False)
    assert straight == pytest.approx({"start": 2, "each": 3, "off": 0}, abs=1e-9)
    assert growth.fitted([{"x": x, "seconds": x * x} for x in sizes], flat=False)["off"] > 0.5
    assert growth.fitted([{"x": x, "seconds": x} for x in sizes], flat=True)["off"] > 0.5


def test_prepared_data_is_measured_and_read_from_the_cache(monkeypatch, tmp_path):
    build_tokenizer("v2-lite-mini").save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(caching, "CACHE", tmp_path)
    preparation.make(tmp_path / "rows.jsonl", 20)
    where = str(tmp_path / "rows.jsonl"), str(tmp_path / "tokenizer")
    assert [preparation.prepare(*where)["from_cache"] for _ in range(2)] == [False, True]


def saved_adapter(folder: Path) -> Path:
    """A run with an adapter, without training it."""
    source = resolve_source(trips.make_model(folder))
    model = apply_lora(load_base(source.base), lora_config(("attention", "experts", "shared_experts"), r=4))
    save_directory(model, load_tokenizer(source), folder / "run" / "final")
    return folder / "run"


def test_trips_take_no_more_changes_of_file_than_the_docs_say(monkeypatch, tmp_path):
    """On the way from files to a model, where an innocent question too many is asked again for each layer or tensor."""
    monkeypatch.setattr(trips, "make_adapter", saved_adapter)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    for start in ("| a plain JSONL row ->", "| hub files ->", "| an adapter ->"):
        row = next(line for line in page if line.startswith(start))
        files, most = (int(number) for number in row.split("|")[-2].split("/"))
        trip = next(trip for name, trip in trips.TRIPS.items() if name.split(" ->")[0] in start)
        call = trip(tmp_path)
        call()
        steps = trips.walk(call)
        taken = len({file for file, _ in steps}), len(trips.changes(steps))
        assert taken[0] <= files and taken[1] <= most, row
        assert taken == (files, most) or sys.version_info >= (3, 12), row  # from then on, comprehensions are not calls
