"""Run directories: what is resumed, what is left alone, what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from conversations import run_files
from conversations.errors import ToolkitError
from conversations.run_files import RECIPE
from deepseek_v2_modeling.checkpoints import sources
from deepseek_v2_modeling.checkpoints.full_disk import checkpoint_step
from deepseek_v2_modeling.training.run_files import METRICS_FILE, SAMPLES_FILE
from recipes.files import atomic_path, read_json, write_json, write_text
from recipes.runs.directory import differences, dump_text, inspect, newest_checkpoint

RECIPE_TREE: dict[str, Any] = {
    "stage": "sft",
    "model": {"path": "m", "dtype": "float32"},
    "data": [{"path": "a.jsonl", "weight": 1.0}],
    "training": {"learning_rate": 1e-6, "max_steps": 5},
    "seed": 0,
}


def a_run(tmp_path: Path, *, checkpoints: tuple[int, ...] = (), status: str = "running") -> Path:
    run_dir = tmp_path / "run"
    for step in checkpoints:
        (run_dir / f"checkpoint-{step}").mkdir(parents=True)
    write_text(run_dir / RECIPE, dump_text(RECIPE_TREE))
    write_json(run_dir / "manifest.json", {"status": status})
    return run_dir


def test_names_in_a_run_directory_are_those_of_the_model() -> None:
    """The model's floor has its own, which a recipe cannot import without torch."""
    names = [run_files.METRICS, run_files.SAMPLES, run_files.FINAL, run_files.MANIFEST, run_files.REWARD_STATS]
    assert names == [METRICS_FILE, SAMPLES_FILE, sources.FINAL, sources.MANIFEST, sources.REWARD_STATS]
    assert checkpoint_step(Path(f"{run_files.CHECKPOINT}7")) == 7


def test_a_missing_or_empty_directory_is_new(tmp_path: Path) -> None:
    assert inspect(tmp_path / "missing", RECIPE_TREE).status == "new"
    assert inspect(tmp_path, RECIPE_TREE).status == "new"


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path, checkpoints=(2, 10, 9))
    (run_dir / "checkpoint-99.tmp").mkdir()
    (run_dir / "checkpoint-100").write_text("no directory")
    state = inspect(run_dir, RECIPE_TREE)
    assert state.status == "resume" and state.checkpoint == run_dir / "checkpoint-10"
    assert newest_checkpoint(tmp_path) is None


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    evaluation = {**RECIPE_TREE, "stage": "eval"}
    run_dir = a_run(tmp_path, checkpoints=(3,), status="finished")
    write_text(run_dir / RECIPE, dump_text(evaluation))
    state = inspect(run_dir, evaluation)
    assert (state.status, state.fault) == ("resume", "results.json is missing or broken")
    write_json(run_dir / "results.json", {})
    assert inspect(run_dir, evaluation).status == "finished"


def test_a_result_that_is_rows_only_has_to_be_there(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path, checkpoints=(3,), status="finished")
    pairs = {**RECIPE_TREE, "stage": "pairs"}
    write_text(run_dir / RECIPE, dump_text(pairs))
    assert inspect(run_dir, pairs).fault == "pairs.jsonl is missing or broken"
    write_text(run_dir / "pairs.jsonl", "")
    assert inspect(run_dir, pairs).status == "finished"


@pytest.mark.parametrize("kind", ["model", "shards", "adapter"])
def test_a_finished_run_has_a_whole_final(tmp_path: Path, kind: str) -> None:
    run_dir = a_run(tmp_path, checkpoints=(3,), status="finished")
    final = run_dir / "final"
    final.mkdir()
    weights = {"model": ["model"], "shards": ["model-1-of-2", "model-2-of-2"], "adapter": ["adapter_model"]}[kind]
    files = [f"{name}.safetensors" for name in weights]
    for name in files:
        save_file({"w": numpy.ones(3)}, final / name)
    write_json(final / "tokenizer_config.json", {})
    if kind == "model":  # a reward model
        write_json(run_dir / "manifest.json", {"status": "finished", "metrics": {"reward_stats": {}}})
        write_json(final / "reward_stats.json", {})
    write_json(final / ("adapter_config.json" if kind == "adapter" else "config.json"), {})
    if kind == "shards":
        write_json(final / "model.safetensors.index.json", {"weight_map": dict(zip("ab", files, strict=True))})
    assert inspect(run_dir, RECIPE_TREE).status == "finished"
    for file in sorted(final.iterdir()):
        whole = file.read_bytes()
        for damage in (b"", whole[:-3]):
            file.write_bytes(damage)
            state = inspect(run_dir, RECIPE_TREE)
            assert state.status == "resume" and state.fault == f"final/{file.name} is missing or broken"
        file.unlink()
        assert inspect(run_dir, RECIPE_TREE).status == "resume"
        file.write_bytes(whole)
    assert inspect(run_dir, RECIPE_TREE).status == "finished"


def test_a_run_that_came_to_nothing_may_be_anybodys(tmp_path: Path) -> None:
    other = {**RECIPE_TREE, "seed": 1}
    assert inspect(a_run(tmp_path), other).status == "new"


@pytest.mark.parametrize("status", ["finished", "running"])
def test_another_recipes_run_is_refused_and_the_keys_are_named(tmp_path: Path, status: str) -> None:
    run_dir = a_run(tmp_path, checkpoints=(1,), status=status)
    other = copy.deepcopy(RECIPE_TREE)
    other["training"]["learning_rate"] = 2e-6
    other["data"][0]["weight"] = 2.0
    before = sorted(str(path) for path in run_dir.rglob("*"))
    with pytest.raises(ToolkitError) as caught:
        inspect(run_dir, other)
    message = str(caught.value)
    assert "data.0.weight is 1.0 there and 2.0 here" in message
    assert "training.learning_rate is 1e-06 there and 2e-06 here" in message
    assert "choose another output_dir" in message and "max_steps" not in message
    assert sorted(str(path) for path in run_dir.rglob("*")) == before


def test_the_division_of_a_batch_matters_unless_processes_share_the_weights(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path, checkpoints=(1,))
    shared = {**RECIPE_TREE, "parallel": {"fsdp": 2}}
    divided = {**RECIPE_TREE["training"], "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(ToolkitError, match=r"training\.per_device_train_batch_size is not set there and 4 here"):
        inspect(run_dir, {**RECIPE_TREE, "training": divided})
    for old, new in ((shared, RECIPE_TREE), (RECIPE_TREE, shared)):
        write_text(run_dir / RECIPE, dump_text(old))
        state = inspect(run_dir, {**new, "training": divided})
        assert state.status == "resume" and state.spread
        with pytest.raises(ToolkitError, match="of another recipe: seed is 0 there and 1 here; choose"):
            inspect(run_dir, {**new, "seed": 1})


def test_files_of_somebody_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ToolkitError, match=r"contains other files \(thesis\.tex\) but no run"):
        inspect(tmp_path, RECIPE_TREE)
    with pytest.raises(ToolkitError, match="is a file"):
        inspect(tmp_path / "thesis.tex", RECIPE_TREE)


def test_differences_are_found_at_every_depth() -> None:
    there, here = {"a": {"b": [1, {"c": 2}]}, "d": 1}, {"a": {"b": [1, {"c": 3}]}, "e": None}
    assert differences(there, here) == {"a.b.1.c": (2, 3), "d": (1, None)}
    assert differences({"a": [1]}, {"a": [1, 2]}) == {"a": ([1], [1, 2])}
    assert differences(RECIPE_TREE, copy.deepcopy(RECIPE_TREE)) == {}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    write_json(target, {"a": float("nan"), "b": [1.5]})
    assert json.loads(target.read_text()) == {"a": None, "b": [1.5]}
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"a": None, "b": [1.5]}
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    assert read_json(tmp_path / "missing.json") is None
