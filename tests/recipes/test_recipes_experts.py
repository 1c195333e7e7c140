"""`dsv2 experts` and runs that train the experts it chose, through the real command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepseek_v2_modeling.esft.choice import read_choice, smallest_set
from deepseek_v2_modeling.esft.full_weights import TRAINED
from deepseek_v2_modeling.loading import load_base, load_model, resolve_source
from recipes.cli import main
from recipes.files import read_json
from recipes.runs.new_model import make_model

from ..helpers.stages import assert_same_weights, stopped_after

RECIPE = """\
stage: sft
model: {path: base}
data: [{path: "tiny:sft_train?n=24"}]
training: {max_steps: 2, per_device_train_batch_size: 12, max_length: 64, save_steps: 1, learning_rate: 1e-2}
output_dir: run
"""
EXPERTS = ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
LORA = "lora={targets: [experts], r: 4, experts_file: run.experts.json}"
FULL = ("experts_file=run.experts.json", "model.dtype=bfloat16")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    make_model(folder, "tiny", 0)
    return folder


@pytest.fixture
def dsv2(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "sft.yaml").write_text(RECIPE, encoding="utf-8")
    return lambda *words: main([*words])


def choose(*experts: int, file: str = "run.experts.json") -> None:
    Path(file).write_text(json.dumps({"experts": {"1": list(experts)}}))


def changed_experts(before: Any, after: Any) -> set[int]:
    """The experts whose weights differ; everything else must be bit-identical."""
    before, after = before.state_dict(), after.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(EXPERTS)
    rows = [(before[name] != after[name]).flatten(1).any(1).nonzero().flatten().tolist() for name in EXPERTS]
    assert rows[0] == rows[1]
    return set(rows[0])


def test_experts_writes_a_file_and_a_page(dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert dsv2("experts", "sft.yaml") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    content = read_json(Path("run.experts.json"))
    chosen = content["experts"]["1"]
    assert line.startswith(f"run.experts.json: {len(chosen)} of 16 experts ({len(chosen)} to {len(chosen)} per layer) ")
    assert "have 10 % of the gate scores of 24 rows" in line and not Path("run").exists()
    assert content["score"] == "gate" and content["threshold"] == 0.1 and content["rows"] == 24
    assert sum(content["scores"]["1"]) == pytest.approx(1, abs=1e-4)
    assert chosen == smallest_set(content["scores"]["1"], 0.1)
    assert read_choice("run.experts.json").layers == {1: tuple(sorted(chosen))}
    page = Path("run.experts.html").read_text()
    assert page.count("<circle") == len(chosen) and "<script" not in page and page.count('class="load ') > 1

    assert dsv2("experts", "sft.yaml", "--score", "token", "--threshold", "0.5", "--tokens", "40", LORA) == 0
    few = read_json(Path("run.experts.json"))  # where the recipe looks for it
    assert few["score"] == "token" and few["rows"] < 24 and 40 <= few["tokens"] < 80
    assert len(few["experts"]["1"]) > len(chosen)
    out = Path("sub/e.json")
    assert dsv2("experts", "sft.yaml", "--output", str(out), "seed=1") == 0 and out.with_suffix(".html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threshold", "0"], "--threshold is 0; it must be a share"),
        (["--threshold", "nan"], "--threshold is nan"),
        (["--threshold", "1.1"], "--threshold is 1.1"),
        (["--score", "mass"], "invalid choice: 'mass'"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--output", "e.txt"], "must be named FILE.json"),
        (["model.path=nowhere"], "nowhere: no such directory"),
        (["data=[{path: none.jsonl}]"], "data.0.path: no such file"),
        (["training.max_length=3"], "no row is left to score on"),
    ],
)
def test_bad_input_ends_with_2(
    dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert dsv2("experts", "sft.yaml", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().glob("*.experts.*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([LORA], "run.experts.json: layer 1 names expert 16; this model's are 0 to 15"),
        (FULL, "run.experts.json: layer 1 names expert 16"),
        (["experts_file=none.json"], "none.json: no such experts file; make one with: dsv2 experts RECIPE"),
    ],
)
def test_a_wrong_file_leaves_no_trace(
    dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    choose(3, 16)
    for command in ("check", "sft"):
        assert dsv2(command, "sft.yaml", *words) == 2
        assert message in capsys.readouterr().err
    assert not Path("run").exists()


def test_lora_on_chosen_experts(
    dsv2: Callable[..., int], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choose(4, 7, 11)
    assert dsv2("sft", "sft.yaml", LORA) == 0
    assert "mlp.experts.gate_up_proj: 1 x rank 4, alpha 8, 3 of 16 experts, " in capsys.readouterr().out
    row = read_json(Path("run/manifest.json"))["trained"][0]
    assert (row["experts"], row["of_experts"]) == (3, 16)
    assert dsv2("merge", "run", "merged") == 0
    assert changed_experts(load_base(str(base)), load_base("merged")) == {4, 7, 11}

    stopped_after(Path("run/checkpoint-1"), tmp_path / "again")  # goes on, to the same numbers
    shutil.move("run", "whole")
    shutil.move("again", "run")
    assert dsv2("sft", "sft.yaml", LORA) == 0
    assert "resuming from checkpoint-1" in capsys.readouterr().out
    assert_same_weights(*(load_model(resolve_source(name)) for name in ("whole", "run")))

    shutil.rmtree("run")
    stopped_after(Path("whole/checkpoint-1"), tmp_path / "run")
    choose(4, 7)
    assert dsv2("sft", "sft.yaml", LORA) == 2
    assert "the experts file (run.experts.json) has changed since the run began" in capsys.readouterr().err


def test_full_fine_tuning_of_chosen_experts(
    dsv2: Callable[..., int], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choose(4, 7, 11)
    assert dsv2("sft", "sft.yaml", *FULL) == 0
    assert "mlp.experts.down_proj: 3 of 16 experts, " in capsys.readouterr().out
    row = read_json(Path("run/manifest.json"))["trained"][0]
    assert (row["projection"], row["experts"], row["of_experts"]) == ("mlp.experts.gate_up_proj", 3, 16)
    found = changed_experts(load_base(str(base), dtype="bfloat16"), load_base("run/final", dtype="bfloat16"))
    assert found == {4, 7, 11}

    stopped_after(Path("run/checkpoint-1"), tmp_path / "again")
    shutil.move("run", "whole")
    shutil.move("again", "run")
    assert dsv2("sft", "sft.yaml", *FULL) == 0
    assert_same_weights(*(load_base(f"{name}/final") for name in ("whole", "run")))
    one, other = (load_file(f"{name}/checkpoint-2/{TRAINED}") for name in ("whole", "run"))  # not rounded to bf16
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {tensor.dtype for name, tensor in one.items() if "chosen_" in name} == {torch.float32}

    shutil.rmtree("run")
    stopped_after(Path("whole/checkpoint-1"), tmp_path / "run")
    choose(4, 7)
    assert dsv2("sft", "sft.yaml", *FULL) == 2
    assert "the experts file (run.experts.json) has changed since the run began" in capsys.readouterr().err
