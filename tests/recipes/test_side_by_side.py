"""Several models in one recipe: a run of each, and their differences on the same rows with intervals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversations.answers.intervals import difference_interval
from recipes.cli import main
from recipes.files import read_json
from recipes.results.figures import Outcome, compared, read_outcomes
from recipes.runs.new_model import make_model
from recipes.runs.side_by_side import compare_runs


@pytest.mark.parametrize("right", [0.5, 0.03])
def test_models_without_a_difference_are_rarely_called_different(right: float) -> None:
    """200 rows, 500 comparisons of models that are right as often; with few right answers few rows differ at all."""
    rng, marked = np.random.default_rng(1), 0
    for _ in range(500):
        before, after = (rng.random(200) < right for _ in range(2))
        sides = [{row: Outcome(float(value)) for row, value in enumerate(side)} for side in (before, after)]
        marked += compared(*sides)["differs"]
    assert marked <= 0.06 * 500


def test_a_true_difference_is_found() -> None:
    rng = np.random.default_rng(0)
    before = {row: Outcome(float(value)) for row, value in enumerate(rng.random(200) < 0.5)}
    after = {row: Outcome(max(one.value, float(rng.random() < 0.2))) for row, one in before.items()}
    change = compared(before, after)
    assert change["differs"] and change["interval"][0] < change["difference"] < change["interval"][1]
    assert not compared(before, before)["differs"] and compared(before, before)["interval"][0] < 0


def test_answers_to_one_prompt_count_once() -> None:
    """20 prompts, each 10 times with the same outcome, say as much as 20 rows."""
    rng = np.random.default_rng(0)
    each = rng.normal(size=20)
    alone = difference_interval(each.tolist(), [1] * 20, range(20))
    repeated = difference_interval(np.repeat(each, 10).tolist(), [1] * 200, np.repeat(np.arange(20), 10).tolist())
    assert repeated == pytest.approx(alone)


def test_several_answers_to_a_row_are_one_outcome(tmp_path: Path) -> None:
    lines = [{"task": "t", "decoding": "t1", "row": 0, "value": value, "prompt": "p"} for value in (1, 0, 0, 0)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_outcomes(tmp_path, "t") == {"t1": {0: Outcome(0.25, 1.0, "p")}}
    assert compare_runs({}, 0)["stages"] == {}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for seed in (0, 1):
        make_model(folder / f"m{seed}", "tiny", seed)
    rows = [{"prompt": f"{n} + 1?", "completion": str(n + 1), "reference": str(n + 1)} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "stage": "eval", "models": {"one": "m0", "other": {"path": "m1"}}, "output_dir": "out",
        "data": [{"path": "rows.jsonl"}],
        "tasks": [
            {"name": "nats", "metric": "loss"},
            {"name": "right", "metric": "exact_match", "max_new_tokens": 3, "temperatures": [1]},
        ],
    }  # fmt: skip
    (folder / "e.yaml").write_text(json.dumps(recipe))
    return folder


def test_each_model_has_a_run_and_all_are_compared(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    assert main(["check", "e.yaml"]) == 0
    assert "-- one (m0)" in capsys.readouterr().out
    assert main(["eval", "e.yaml"]) == 0
    said = capsys.readouterr().out
    assert "nats: one to other" in said and "T = 1" in said and "*: it leaves zero" in said
    results = read_json(Path("out/results.json"))
    for name, figures in results["stages"].items():
        assert read_json(Path("out") / name / "results.json") == {"version": 1, **figures}
    change = results["nats: one to other"]["change"]["loss"]
    assert change["difference"] == pytest.approx(
        results["stages"]["other"]["nats_loss"] - results["stages"]["one"]["nats_loss"]
    )
    assert change["n"] == 6 and not change["shares"]
    written = {path: path.read_bytes() for path in Path("out").rglob("*.json*")}
    assert main(["eval", "e.yaml"]) == 0
    assert {path: path.read_bytes() for path in Path("out").rglob("*.json*")} == written
    assert main(["eval", "e.yaml", "seed=3"]) == 2
    assert "holds the run of another recipe: seed is 0 there and 3 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("models={one: m0}", "models names one model"),
        ("model={path: m1}", "models and model: give one of them"),
        ("models={one: m0, other: absent}", "absent"),
        ("models={One: m0, other: m1}", "models.One"),
    ],
)
def test_wrong_models_are_one_message(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str, fault: str
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in ("check", "eval"):
        if command == "check" and "absent" in word:
            continue  # a name like that may be a hub's, which check does not ask
        assert main([command, "e.yaml", word, "output_dir=elsewhere"]) == 2
        assert fault in capsys.readouterr().err


def test_every_model_that_fails_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["eval", "e.yaml", "models={a: absent, b: missing, one: m0}", "output_dir=some"]) == 2
    said = capsys.readouterr().err
    assert "a: absent" in said and "b: missing" in said and "figures of the others are in some" in said
    assert list(read_json(Path("some/results.json"))["stages"]) == ["one"]
    Path("empty.jsonl").write_text("")
    assert main(["eval", "e.yaml", "data=[{path: empty.jsonl}]", "output_dir=none"]) == 2
    said = capsys.readouterr().err
    assert "one, other: " in said and said.count("empty.jsonl: no rows") == 1 and "figures of the others" not in said
