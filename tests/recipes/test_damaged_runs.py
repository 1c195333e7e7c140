"""A run resumes from a complete checkpoint, with what it began with, or says in one line why it cannot."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sft.stage
from deepseek_v2_modeling.training.checksums import SUMS_FILE, damage
from recipes.cli import main
from recipes.runs.new_model import make_model

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "learning_rate": 1e-3}
COMMON: dict[str, Any] = {"model": {"path": "base"}, "output_dir": "run", "seed": 1}
LORA = {"targets": ["attention"], "r": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"stage": "sft", "data": [{"path": "tiny:sft_train?n=6"}], "lora": LORA},
    "full": {"stage": "sft", "data": [{"path": "tiny:sft_train?n=6"}]},
    "reward": {"stage": "reward", "data": [{"path": "tiny:helpful_train?n=6"}], "lora": LORA},
    "rl": {
        "stage": "rl",
        "data": [{"path": "tiny:rl_reasoning?n=6"}],
        "lora": LORA,
        "rewards": [{"rule": "format"}],
        "training": {**TRAINING, "num_generations": 2, "max_completion_length": 4, "beta": 0.1},
    },
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _garbage(path: Path) -> None:
    """Of the same length."""
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": _cut,
    "garbage": _garbage,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run of each recipe, with checkpoint-1 and checkpoint-2."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sft.stage, "SAMPLE_TOKENS", 1)
        make_model(Path("base"), "tiny", 0)
        for name, recipe in RECIPES.items():
            content = {"training": {**TRAINING, "max_length": 64}, **COMMON, **recipe, "output_dir": name}
            Path(f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")
            assert main([recipe["stage"], f"{name}.yaml"]) == 0
        yield folder


@pytest.fixture
def begun(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Makes copies of the runs that have their checkpoints, and no final/ yet; the command that resumes one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft.stage, "SAMPLE_TOKENS", 1)
    (tmp_path / "base").symlink_to(folder / "base")

    def again(name: str, *words: str) -> int:
        if not Path(name).exists():
            shutil.copytree(folder / name, name, ignore=shutil.ignore_patterns("final"))
            shutil.copy(folder / f"{name}.yaml", ".")
        return main([RECIPES[name]["stage"], f"{name}.yaml", *words]) if words != ("only copy",) else 0

    return again


def names_of(checkpoint: Path) -> list[str]:
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", RECIPES)
def test_each_file_of_a_checkpoint_is_missed(
    begun: Callable[..., int], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    begun(name, "only copy")
    checkpoint = Path(name, "checkpoint-2")
    files = names_of(checkpoint)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "run_state.json"} < set(files)
    manifest = Path(name, "manifest.json").read_bytes()
    for file, (way, do) in product(files, DAMAGES.items()):
        whole = (checkpoint / file).read_bytes()
        do(checkpoint / file)
        capsys.readouterr()
        assert begun(name) == 2, (file, way)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {checkpoint}: {file} is "), (line, way)
        assert f"delete or move {checkpoint}, and the same command resumes from checkpoint-1" in line
        (checkpoint / file).write_bytes(whole)
    assert damage(checkpoint) is None
    assert Path(name, "manifest.json").read_bytes() == manifest and not Path(name, "final").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_message_says_works(begun: Callable[..., int], folder: Path, name: str) -> None:
    """The run resumes from the older checkpoint, to the weights of one that was never interrupted."""
    begun(name, "only copy")
    (Path(name) / "checkpoint-2" / "optimizer.pt").unlink()
    assert begun(name) == 2
    shutil.rmtree(Path(name, "checkpoint-2"))
    assert begun(name) == 0
    for file in (folder / name / "final").glob("*.safetensors"):
        assert (Path(name) / "final" / file.name).read_bytes() == file.read_bytes()


def test_without_a_whole_checkpoint_all_are_named(
    begun: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    begun("lora", "only copy")
    for number in (1, 2):
        Path(f"lora/checkpoint-{number}/scheduler.pt").unlink()
    assert begun("lora") == 2
    assert "delete or move lora/checkpoint-2, lora/checkpoint-1, and the same command starts over" in (
        capsys.readouterr().err
    )
    for number in (1, 2):
        shutil.rmtree(f"lora/checkpoint-{number}")
    assert begun("lora") == 0


def test_weights_of_another_shape_are_damage(begun: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    begun("lora", "only copy")
    path = Path("lora/checkpoint-2/adapter_model.safetensors")
    tensors = {name: torch.cat((tensor, tensor)) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert begun("lora") == 2
    assert "adapter_model.safetensors is damaged" in capsys.readouterr().err


def test_sums_that_are_no_sums(begun: Callable[..., int]) -> None:
    begun("lora", "only copy")
    for text in ("[]", "{}", '{"optimizer.pt": 3}', '{"optimizer.pt": {"bytes": "x", "crc32": 1}}', "null"):
        Path("lora/checkpoint-2", SUMS_FILE).write_text(text)
        assert begun("lora") == 2, text


def test_a_damaged_best_checkpoint_is_found_before_training(
    begun: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is wanted at the end only, and its loss would be noticed when everything is done."""
    words = (
        "eval_data=[{path: 'tiny:sft_heldout?n=2'}]",
        "training={max_steps: 3, per_device_train_batch_size: 2, save_steps: 1, eval_steps: 1, eval_strategy: steps, "
        "load_best_model_at_end: true, learning_rate: 100, max_length: 64}",
        "output_dir=best",
    )
    begun("full", "only copy")
    assert begun("full", *words) == 0
    state = json.loads(Path("best/checkpoint-3/trainer_state.json").read_text())
    best = Path("best", f"checkpoint-{state['best_global_step']}")
    assert best.name != "checkpoint-3"
    shutil.rmtree("best/final")
    _cut(best / "model.safetensors")
    assert begun("full", *words) == 2
    assert f"{best}: model.safetensors is cut short" in capsys.readouterr().err


# --- what the run began with ------------------------------------------------------------------------------------------


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def other_weight(path: Path) -> None:
    tensors = load_file(path)
    tensors[min(tensors)].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


START: dict[str, Callable[[], Any]] = {
    "base model": lambda: other_weight(Path("base/model.safetensors")),
    "tokenizer": lambda: change(Path("base/tokenizer_config.json"), '"bos_token": ', '"x": 1, "bos_token": '),
    "chat template": lambda: Path("base/chat_template.jinja").write_text("{{ messages }}"),
}


def own_base(folder: Path) -> None:
    Path("base").unlink()
    shutil.copytree(folder / "base", "base")


def refused(run: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line in which a run says that it cannot be resumed."""
    capsys.readouterr()
    assert run() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "cannot be resumed" in lines[0]
    return lines[0]


@pytest.mark.parametrize("part", START)
def test_another_model_is_noticed(
    begun: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    begun("lora", "only copy")
    own_base(folder)
    START[part]()
    assert f"the {part} (base) has changed since the run began" in refused(lambda: begun("lora"), capsys)
    assert not Path("lora/final").exists()


def test_another_config_or_place_of_the_same_model(begun: Callable[..., int], folder: Path) -> None:
    """A copy of the base, with other times, is the same base; one with another setting is not."""
    begun("lora", "only copy")
    own_base(folder)
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "routed_scaling_factor": 7.0}))
    assert begun("lora") == 2
    Path("base/config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}))
    assert begun("lora") == 0


def test_another_adapter_reward_model_or_experts_file_is_noticed(
    begun: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "lora", "start")
    shutil.copytree(folder / "reward", "judge")
    begun("rl", "only copy")
    words = ("model.path=start", "rewards=[{model: judge}]", "output_dir=out")
    assert begun("rl", *words) == 0
    shutil.rmtree("out/final")
    for file, part in (
        ("start/final/adapter_model.safetensors", "adapter (start/final)"),
        ("judge/final/adapter_model.safetensors", "reward model rewards.0 (judge)"),
    ):
        whole = Path(file).read_bytes()
        other_weight(Path(file))
        assert f"the {part} has changed since the run began" in refused(lambda: begun("rl", *words), capsys)
        Path(file).write_bytes(whole)
    change(Path("judge/final/reward_stats.json"), '"mean": ', '"mean": 1')
    assert "reward model rewards.0" in refused(lambda: begun("rl", *words), capsys)


def test_other_experts_are_noticed(begun: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    begun("lora", "only copy")
    words = ("lora={targets: [experts], r: 2, experts_file: experts.json}", "output_dir=out")
    Path("experts.json").write_text('{"experts": {"1": [0, 3]}}')
    assert begun("lora", *words) == 0
    shutil.rmtree("out/final")
    Path("experts.json").write_text('{"experts": {"1": [0, 2]}}')
    assert "the experts file (" in refused(lambda: begun("lora", *words), capsys)


def test_another_number_of_processes_is_noticed(begun: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    begun("lora", "only copy")
    manifest = json.loads(Path("lora/manifest.json").read_text())
    assert manifest["start"]["processes"] == 1 and manifest["start"]["global batch"] == 2
    manifest["start"] |= {"processes": 4, "global batch": 8}
    Path("lora/manifest.json").write_text(json.dumps(manifest))
    line = refused(lambda: begun("lora"), capsys)
    assert "it began with 4 processes (global batch 8) and there are 1 now (global batch 2)" in line


def test_a_run_without_its_manifest_does_not_go_on(
    begun: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    begun("lora", "only copy")
    manifest = Path("lora/manifest.json")
    manifest.unlink()
    assert "manifest.json is missing" in refused(lambda: begun("lora"), capsys)
    for file in (manifest, Path("lora/recipe.yaml")):
        file.write_bytes(b"\x00{")
        assert begun("lora") == 2
        assert str(file) in capsys.readouterr().err


def test_lines_that_metrics_have_lost_are_told(begun: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    begun("lora", "only copy")
    metrics = Path("lora/metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0])
    assert begun("lora") == 0
    assert f"{metrics}: only {len(lines[0]):,} of the " in capsys.readouterr().err
    assert metrics.read_text().startswith(lines[0])


# --- what a run has merged --------------------------------------------------------------------------------------------

MERGING = (
    "model.path=start",
    "lora={targets: [attention], r: 3}",
)  # another rank than the adapter has


def test_another_merged_base_is_noticed(
    begun: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "lora", "start")
    begun("rl", "only copy")
    assert begun("rl", *MERGING, "output_dir=out") == 0
    unbroken = Path("out/final/adapter_model.safetensors").read_bytes()
    shutil.rmtree("out/final")
    other_weight(Path("out/base/model.safetensors"))
    assert "the merged base model (out/base) has changed since the run began" in refused(
        lambda: begun("rl", *MERGING, "output_dir=out"), capsys
    )
    shutil.rmtree("out/base")  # it is merged again
    assert begun("rl", *MERGING, "output_dir=out") == 0
    assert Path("out/final/adapter_model.safetensors").read_bytes() == unbroken


def test_what_another_run_without_a_checkpoint_has_merged_is_not_trained_on(
    begun: Callable[..., int], folder: Path
) -> None:
    shutil.copytree(folder / "lora", "start")
    begun("rl", "only copy")
    assert begun("rl", *MERGING, "output_dir=out") == 0
    for name in ("final", "checkpoint-1", "checkpoint-2"):
        shutil.rmtree(Path("out", name))
    other_weight(Path("start/final/adapter_model.safetensors"))
    before = Path("out/base/model.safetensors").read_bytes()
    assert begun("rl", *MERGING, "output_dir=out") == 0
    assert Path("out/base/model.safetensors").read_bytes() != before


def test_a_base_where_the_run_would_merge_to_is_refused(
    begun: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "lora", "start")
    begun("rl", "only copy")
    shutil.copytree(folder / "base", "out/base")
    Path("out/recipe.yaml").write_text("{}")
    change(Path("start/final/adapter_config.json"), str((folder / "base").resolve()), str(Path("out/base").resolve()))
    assert begun("rl", *MERGING, "output_dir=out") == 2
    assert "where this run merges the two; choose another output_dir" in capsys.readouterr().err
    assert Path("out/base/model.safetensors").exists()
