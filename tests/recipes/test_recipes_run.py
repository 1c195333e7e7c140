"""One stage through the real command line: its run directory, refusals, an interruption and what follows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import sft.stage
from deepseek_v2_modeling.training.mixin import RunTrainerMixin, StopRequested
from recipes.cli import main
from recipes.files import read_json
from recipes.recipe.yaml_text import read_mapping
from recipes.runs.new_model import make_model

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
    assert dsv2("check", "sft.yaml", "model.path=run", "output_dir=next") == 0
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
    rows, written = Path("rows.jsonl").read_bytes(), Path("run/checkpoint-2/trainer_state.json").stat().st_mtime_ns
    Path("rows.jsonl").write_bytes(rows + rows)
    assert dsv2("sft", "sft.yaml") == 2
    assert "rows.jsonl has changed since the run began" in capsys.readouterr().err
    Path("rows.jsonl").write_bytes(rows)
    assert dsv2("sft", "sft.yaml") == 0
    assert "run: resuming from checkpoint-2" in capsys.readouterr().out
    again = read_json(Path("run/manifest.json"))
    assert again["status"] == "finished" and again["seconds"] > manifest["seconds"]
    assert again["resumed"][0]["from"] == "run/checkpoint-2" and Path("run/final").is_dir()
    assert Path("run/checkpoint-2/trainer_state.json").stat().st_mtime_ns == written  # no step a second time


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.path=nowhere",), "nowhere: no such directory"),
        (("model.path=.",), "no config.json and no adapter_config.json"),
        (("data=[{path: missing.jsonl}]",), "missing.jsonl"),
        (("data=[{path: empty.jsonl}]",), "empty.jsonl: no rows"),
        (("data.0.on_bad_row=error",), "rows.jsonl:5"),
        (("training.max_stepz=1",), 'unknown key "training.max_stepz", did you mean "training.max_steps"?'),
        (("model.config.topk=1",), 'unknown key "model.config.topk"'),
        (("output_dir=.",), "contains other files"),
        (("output_dir=rows.jsonl",), "output_dir rows.jsonl is a file"),
        (("model.path=new", "model.preset=large"), 'unknown preset "large"'),
        (("lora.targets=[router]", "model.config.n_routed_experts=0"), 'the LoRA target "router" matches nothing'),
        (("lora.targets=[dense]", "model.config.first_k_dense_replace=0"), 'the LoRA target "dense" matches nothing'),
        (("model.path=cut",), "adapter_model.safetensors: not a readable safetensors file"),
    ],
)
def test_bad_input_ends_with_2_and_leaves_no_trace(
    dsv2: Callable[..., int], words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.jsonl").write_text("")
    Path("cut").mkdir()
    Path("cut/adapter_config.json").write_text('{"base_model_name_or_path": "base", "peft_type": "LORA"}')
    Path("cut/adapter_model.safetensors").write_bytes(b"")
    before = sorted(path.name for path in Path().iterdir() if path.name != "runs")
    assert dsv2("sft", "sft.yaml", *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and "Traceback" not in captured.err
    assert sorted(path.name for path in Path().iterdir() if path.name != "runs") == before


@pytest.mark.parametrize(
    ("targets", "config", "stage"),
    [
        ("[shared_experts]", "{n_shared_experts: null}", "sft"),
        ("[dense]", "{first_k_dense_replace: 0}", "sft"),
        ("[attention, lm_head]", "{}", "reward"),
    ],
)
@pytest.mark.parametrize("model", [("model.path=base",), ("model.path=new", "model.preset=tiny")])
def test_targets_that_match_nothing_are_found_before_the_data_is_read(
    dsv2: Callable[..., int],
    targets: str,
    config: str,
    stage: str,
    model: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (f"stage={stage}", f"lora.targets={targets}", f"model.config={config}", "data=[{path: none.jsonl}]", *model)
    for command in ("check", stage):
        assert dsv2(command, "sft.yaml", *words) == 2
        message = capsys.readouterr().err
        assert "matches nothing in this model: leave it out" in message and message.count("\n") == 1
    assert not Path("run").exists() and not Path("new").exists()


@pytest.mark.parametrize("key", ["routing_replay=update", "train_router=true"])
def test_keys_of_routed_experts_are_refused_for_a_dense_model(
    dsv2: Callable[..., int], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("stage=rl", "rewards=[{rule: number}]", "lora=null", "training={}", "data=[{path: none.jsonl}]", key)
    for command in ("check", "rl"):
        assert dsv2(command, "sft.yaml", *words, "model.config={first_k_dense_replace: 2}") == 2
        assert f"error: {key.partition('=')[0]} is for routed experts, and base has none" in capsys.readouterr().err
    assert dsv2("check", "sft.yaml", *words) == 2 and "none.jsonl" in capsys.readouterr().err


def test_a_broken_adapter_ends_with_2(dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    words = ("lora={targets: [attention, lm_head, embeddings], r: 2, dropout: 0.25, rslora: true}",)
    assert dsv2("sft", "sft.yaml", *words) == 0
    out = capsys.readouterr().out
    assert "self_attn.o_proj: 2 x rank 2, alpha 4, dropout 0.25, " in out
    assert "lm_head: 1 x rank 2, alpha 4, dropout 0.25, " in out and "embed_tokens: 1 x rank 2, alpha 4, " in out
    rows = {row["projection"]: row for row in read_json(Path("run/manifest.json"))["trained"]}
    assert rows["lm_head"]["dropout"] == 0.25 and rows["embed_tokens"]["dropout"] == 0
    assert rows["lm_head"]["scaling"] == pytest.approx(4 / 2**0.5)
    file = Path("run/final/adapter_model.safetensors")
    whole = file.read_bytes()
    for content, message in ((whole[:-9], "cut short"), (whole[:-4] + b"\xff" * 4, "contains NaN or infinite")):
        file.write_bytes(content)
        assert dsv2("chat", "run", "--prompt", "1?") == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said


def test_dropout_that_the_trainer_turns_off_is_told(
    dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("stage=reward", "data=[{path: 'tiny:helpful_train?n=6'}]", "lora.dropout=0.5")
    assert dsv2("reward", "sft.yaml", *words) == 0
    assert "lora.dropout is 0.5 but training.disable_dropout is true" in capsys.readouterr().out
    assert {row["dropout"] for row in read_json(Path("run/manifest.json"))["trained"]} == {0}


@pytest.mark.parametrize(
    ("preset", "experts"), [("youtu-mini", "all dense"), ("deepseek-moe-mini", "64 routed and 2 shared experts")]
)
def test_init_says_what_it_made(
    dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str], preset: str, experts: str
) -> None:
    assert dsv2("init", "made", "--preset", preset) == 0
    said = capsys.readouterr()
    assert f"6 layers, {experts}, vocabulary 8192" in said.out and not said.err


def test_a_preset_makes_the_missing_model_by_seed(dsv2: Callable[..., int], base: Path) -> None:
    assert dsv2("init", "base", "--preset", "tiny") == 2  # it is there
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert dsv2("init", name, "--preset", "tiny", "--seed", str(seed)) == 0
    weights = [Path(name, "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert dsv2("sft", "sft.yaml", "model.path=d", "model.preset=tiny", "seed=1", "output_dir=other") == 0
    assert Path("d/model.safetensors").read_bytes() == weights[2]
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
    assert "unknown rule 'numbers' (did you mean 'number'?)" in capsys.readouterr().err and not Path("out").exists()
