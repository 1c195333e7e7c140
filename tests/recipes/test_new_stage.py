"""A new stage is one folder and one line: two toy stages go through every part of `dsv2` that knows stages."""

import ast
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recipes import stages as stage_list
from recipes.cli import main
from recipes.runs.new_model import make_model

TOYS = ("recall", "tally")
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 64, "save_steps": 1, "learning_rate": 1e-2}
RECALL = {"stage": "recall", "model": {"path": "base"}, "lora": {"targets": ["attention"], "r": 2}}
RECALL |= {"data": [{"path": "rows.jsonl"}], "training": TRAINING, "output_dir": "recall"}
TALLY = {"stage": "tally", "model": {"path": "base"}, "data": [{"path": "rows.jsonl"}], "output_dir": "tally"}
CHAIN = {
    "stage": "chain",
    "model": {"path": "base"},
    "stages": [
        {"name": "learn", "recipe": "recall.yaml"},
        {"name": "count", "recipe": "tally.yaml", "model": {"path": "${learn}"}, "limit": 3},
        {"name": "more", "recipe": "recall.yaml", "model": {"path": "${learn}"}, "max_tokens": "${learn.tokens}"},
    ],
    "output_dir": "chain",
}


@pytest.fixture
def dsv2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "new_stages")
    monkeypatch.setattr(stage_list, "FOLDERS", (*stage_list.FOLDERS, *TOYS))  # the one line
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base", "tiny", 0)
    Path("rows.jsonl").write_text("".join(json.dumps({"text": f"{n} and {n + 1} and so on"}) + "\n" for n in range(6)))
    for name, recipe in (("recall", RECALL), ("tally", TALLY), ("chain", CHAIN)):
        Path(f"{name}.yaml").write_text(json.dumps(recipe))
    yield lambda *words: main([*words])
    for name in [name for name in sys.modules if name.partition(".")[0] in TOYS]:
        del sys.modules[name]


def test_a_new_stage_is_one_folder_and_one_line(dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert dsv2("--help") == 0
    assert "learn texts by heart" in capsys.readouterr().out
    assert dsv2("sft", "recall.yaml") == 2
    assert "is a recipe of stage recall, not sft; run: dsv2 recall recall.yaml" in capsys.readouterr().err
    assert dsv2("recall", "recall.yaml", "training.max_step=1") == 2
    assert 'unknown key "training.max_step", did you mean "training.max_steps"?' in capsys.readouterr().err
    assert dsv2("check", "recall.yaml") == 0
    out = capsys.readouterr().out
    assert "of them trained" in out and "training: 2 steps of batch 2 (3 per epoch" in out
    assert dsv2("check", "tally.yaml") == 0 and dsv2("check", "chain.yaml") == 0
    assert dsv2("check", "chain.yaml", "stages.count.results=stages.base") == 2
    assert "stages.count.results: for evaluations only" in capsys.readouterr().err

    assert dsv2("recall", "recall.yaml", "--smoke", "output_dir=small") == 0
    assert "training.max_length: 64 -> 16" in capsys.readouterr().out
    assert dsv2("tally", "tally.yaml", "--smoke", "output_dir=small_tally", "size.batch=2") == 0
    assert Path("small_tally/tally.jsonl").read_text().count("\n") == 6
    assert "small_tally/tally.jsonl (" in capsys.readouterr().out
    assert dsv2("tally", "tally.yaml", "--smoke", "output_dir=small_tally", "size.batch=2") == 0
    assert "this run is finished; nothing to do" in capsys.readouterr().out
    Path("small_tally/tally.jsonl").unlink()
    assert dsv2("tally", "tally.yaml", "--smoke", "output_dir=small_tally", "size.batch=2") == 0
    assert Path("small_tally/tally.jsonl").is_file()


def test_new_stages_in_a_chain_and_a_report(dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert dsv2("check", "chain.yaml", "stages.more.model.path=${count}") == 2
    assert "chain/count will not contain a model; name a stage that trains one" in capsys.readouterr().err
    assert dsv2("run", "chain.yaml") == 0
    assert Path("chain/count/tally.jsonl").read_text().count("\n") == 3
    first, more = (json.loads(Path(f"chain/{name}/manifest.json").read_text()) for name in ("learn", "more"))
    assert first["metrics"]["steps"] == more["metrics"]["steps"] == 2 and more["status"] == "finished"
    assert dsv2("run", "chain.yaml") == 0
    assert capsys.readouterr().out.count("already finished") == 3
    assert dsv2("report", "chain") == 0
    page = Path("chain/report.html").read_text(encoding="utf-8")
    assert "texts by heart" in page and "tally.jsonl is missing" not in page and "samples.jsonl is missing" not in page


def test_recipes_know_no_stage_by_name() -> None:
    """Outside recipes/stages.py no module imports a stage, compares with the name of one or maps from it."""
    told = []
    for file in sorted(Path(stage_list.__file__).parent.rglob("*.py")):
        if file == Path(stage_list.__file__) or file.parent.name == "tiny":  # the demo's data is its own
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            parts += [key for key in node.keys if key] if isinstance(node, ast.Dict) else []
            constants = [part for whole in parts for part in ast.walk(whole) if isinstance(part, ast.Constant)]
            found = {name.partition(".")[0] for name in names} | {str(constant.value) for constant in constants}
            told += [f"{file.name}:{node.lineno}: {name}" for name in found.intersection(stage_list.FOLDERS)]
    assert told == []
