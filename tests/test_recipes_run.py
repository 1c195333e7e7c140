"""One stage through the real command line: its run directory, refusals, an interruption and what follows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import sft.stage
from deepseek_v2_modeling.trainer import RunTrainerMixin, StopRequested
from recipes.cli import main
from recipes.files import read_json
from recipes.init import make_model
from recipes.yaml_text import read_mapping

RECIPE = """\
stage: sft
model: {path: base}
lora: {targets: [attention], r: 2}
data:
  - {path: rows.jsonl, on_bad_row: skip}
  - {path: "tiny:sft_train?n=6"}
training: {max_steps: 2, per_device_train_batch_size: 2, max_length: 64, save_steps: 1, learning_rate: 1e-3}
output_dir: run
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    make_model(folder, "tiny", 0)
    return folder


@pytest.fixture
def dsv2(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft.stage, "SAMPLE_TOKENS", 2)
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "sft.yaml").write_text(RECIPE, encoding="utf-8")
    rows = [json.dumps({"prompt": f"{n} + 1?", "completion": str(n + 1)}) for n in range(4)]
    (tmp_path / "rows.jsonl").write_bytes("\n".join(rows).encode() + b"\nbroken \xff\n")
    return lambda *words: main([*words])


def test_a_run_directory_explains_itself(dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert dsv2("sft", "sft.yaml", "seed=5") == 0
    run = Path("run")
    recipe = read_mapping(run / "recipe.yaml")
    assert (
        recipe["seed"] == 5
        and recipe["lora"]["r"] == 2
        and recipe["data"][0]["path"] == str(Path("rows.jsonl").resolve())
    )
    manifest = read_json(run / "manifest.json")
    assert manifest["status"] == "finished" and manifest["seed"] == 5 and manifest["versions"]["torch"]
    assert [(file["rows"], file["used"]) for file in manifest["data"]] == [(4, 4), (6, 6)]
    assert {row["projection"] for row in manifest["trained"]} >= {"self_attn.o_proj"}
    assert manifest["metrics"]["steps"] == 2 and manifest["seconds"] > manifest["training_seconds"] > 0
    rejected = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["row"]) for row in rejected] == [(5, "broken \\udcff")]
    assert (run / "final" / "adapter_config.json").exists()
    out = capsys.readouterr().out
    assert "rows.jsonl: prompt/completion, 4 rows; 1 row left out" in out and "run/final" in out
    before = (run / "manifest.json").read_bytes()
    assert dsv2("sft", "sft.yaml", "seed=5") == 0
    assert "this run is finished; nothing to do" in capsys.readouterr().out
    assert dsv2("sft", "sft.yaml", "seed=6") == 2
    assert "holds the run of another recipe: seed is 5 there and 6 here" in capsys.readouterr().err
    assert (run / "manifest.json").read_bytes() == before
    assert dsv2("chat", "run", "--prompt", "1 + 1?", "--max-new-tokens", "2") == 0
    assert dsv2("check", "sft.yaml", "model.path=run") == 0
    assert "training: 2 steps of batch 2" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(
    dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def stop(self: RunTrainerMixin, dtype: str, *args: object) -> None:
            raise StopRequested("stopped at step 2; checkpoint written")

        patch.setattr(RunTrainerMixin, "finish", stop)
        assert dsv2("sft", "sft.yaml") == 130
    assert "interrupted: stopped at step 2" in capsys.readouterr().err
    manifest = read_json(Path("run/manifest.json"))
    assert manifest["status"] == "stopped" and manifest["seconds"] > 0 and not Path("run/final").exists()
    assert dsv2("chat", "run", "--prompt", "x") == 2
    rows = Path("rows.jsonl").read_bytes()
    Path("rows.jsonl").write_bytes(rows + rows)
    assert dsv2("sft", "sft.yaml") == 2
    assert "rows.jsonl has changed since the run began" in capsys.readouterr().err
    Path("rows.jsonl").write_bytes(rows)
    assert dsv2("sft", "sft.yaml") == 0
    assert "run: going on from checkpoint-2" in capsys.readouterr().out
    again = read_json(Path("run/manifest.json"))
    assert again["status"] == "finished" and again["seconds"] > manifest["seconds"]
    assert again["resumed"][0]["from"] == "run/checkpoint-2" and Path("run/final").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.path=nowhere",), "nowhere: there is no such directory"),
        (("model.path=.",), "no config.json and no adapter_config.json"),
        (("data=[{path: missing.jsonl}]",), "missing.jsonl"),
        (("data=[{path: empty.jsonl}]",), "empty.jsonl: no rows"),
        (("data.0.on_bad_row=error",), "rows.jsonl:5"),
        (("training.max_stepz=1",), 'unknown key "training.max_stepz", did you mean "training.max_steps"?'),
        (("model.config.topk=1",), 'unknown key "model.config.topk"'),
        (("output_dir=.",), "holds other files"),
        (("output_dir=rows.jsonl",), "output_dir rows.jsonl is a file"),
        (("model.path=new", "model.preset=large"), 'unknown preset "large"'),
    ],
)
def test_bad_input_ends_with_2_and_leaves_no_trace(
    dsv2: Callable[..., int], words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.jsonl").write_text("")
    before = sorted(path.name for path in Path().iterdir() if path.name != "runs")
    assert dsv2("sft", "sft.yaml", *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and "Traceback" not in captured.err
    assert sorted(path.name for path in Path().iterdir() if path.name != "runs") == before


def test_a_preset_makes_the_missing_model_by_seed(dsv2: Callable[..., int], base: Path) -> None:
    assert dsv2("init", "base", "--preset", "tiny") == 2  # it is there
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert dsv2("init", name, "--preset", "tiny", "--seed", str(seed)) == 0
    weights = [Path(name, "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert dsv2("check", "sft.yaml", "model.path=new", "model.preset=tiny") == 0
    assert not Path("new").exists()  # check makes no model


def test_the_wrong_kind_of_model_is_refused(dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    rl = "stage: rl\nmodel: {path: base}\ndata: [{path: 'tiny:rl_reasoning?n=4'}]\noutput_dir: out\n"
    Path("rl.yaml").write_text(rl + "rewards: [{model: base}]\n")
    assert dsv2("rl", "rl.yaml", "--smoke") == 2
    assert "base is a chat model, not a reward model; train one with: dsv2 reward" in capsys.readouterr().err
    Path("rl.yaml").write_text(rl + "rewards: [{model: missing}]\n")
    assert dsv2("rl", "rl.yaml") == 2
    Path("rl.yaml").write_text(rl + "rewards: [{rule: numbers}]\n")
    assert dsv2("rl", "rl.yaml") == 2
    assert "there is no reward rule 'numbers'" in capsys.readouterr().err and not Path("out").exists()
