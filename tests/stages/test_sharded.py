"""Two processes that share the weights (FSDP2) do what one does with the same global batch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_v2_modeling import DeepseekV2ForCausalLM, merge_lora
from recipes.cli import main

from ..helpers import sharded_launch as launched
from ..helpers.stages import lines, weights

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
LIMIT = 240  # seconds; nothing may hang


@pytest.fixture(scope="module")
def runs(tmp_path_factory, module_patch):
    """All runs: of one process, then of two, then what one goes on with."""
    folder = tmp_path_factory.mktemp("sharded")
    module_patch.chdir(folder)
    launched.prepare(folder)
    for name in launched.RECIPES:
        assert launched.train(name, folder, f"one_{name}") == 0
    for name in launched.STEPPED:
        launched.stopped_at(1, folder / f"one_{name}", folder / f"one_to_two_{name}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.helpers.sharded_launch", str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in launched.STEPPED:
        launched.stopped_at(2, folder / f"two_{name}", folder / f"two_to_one_{name}")
        launched.stopped_at(3, folder / f"one_to_two_{name}", folder / f"one_to_two_to_one_{name}")
        for run in ("two_to_one", "one_to_two_to_one"):
            assert launched.train(name, folder, f"{run}_{name}") == 0
    return folder


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def steps(run: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(run / "metrics.jsonl") if key in line]


@pytest.mark.parametrize(
    ("run", "rel"),
    [
        ("two_full", 1e-5),
        ("two_lora", 1e-5),
        ("two_chosen", 1e-5),
        ("two_quantized", 1e-5),
        ("two_reward", 1e-4),
        ("two_dpo", 1e-5),
        ("two_kto", 1e-5),
        ("two_packed", 2e-2),
        ("ep_full", 1e-5),
        ("ep_lora", 1e-5),
        ("ep_chosen", 1e-5),
        ("ep_quantized", 1e-5),
        ("ep_packed", 2e-2),
    ],
)
def test_losses_are_those_of_one_process(runs: Path, run: str, rel: float) -> None:
    name = run.partition("_")[2]
    one, two = steps(runs / f"one_{name}"), steps(runs / run)
    assert len(one) == launched.RECIPES[name]["training"]["max_steps"]
    assert two == pytest.approx(one, rel=rel)
    assert steps(runs / run, "balance/expert") == pytest.approx(
        steps(runs / f"one_{name}", "balance/expert"), rel=max(rel, 1e-4)
    )


@pytest.mark.parametrize("name", list(launched.RL))
def test_rollouts_and_updates_are_those_of_processes_with_all_weights(runs: Path, name: str) -> None:
    """Answers end at different lengths, and a process without any goes on with the others."""
    one, two = runs / f"one_{name}", runs / f"two_{name}"
    for key in ("reward", "completions/mean_length", "eval_completions/mean_length"):
        assert steps(two, key) == pytest.approx(steps(one, key), rel=1e-6), key
    assert len(set(steps(one, "completions/mean_length"))) > 1 and any(steps(one, "reward"))
    for key in ("loss", "kl", "grad_norm", "entropy"):
        assert steps(two, key) == pytest.approx(steps(one, key), rel=1e-4, abs=1e-6), key
    assert any(steps(one, "kl"))
    assert all(json.loads((runs / f"two_{name}.meshes.json").read_text()).values())


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("full", ["loss", "mean_token_accuracy"]),
        ("reward", ["loss", "mean_reward", "margin", "accuracy"]),
        ("dpo", ["loss", "rewards/margins", "rewards/accuracies"]),
        ("kto", ["rewards/margins"]),  # in its loss is the mean KL of all processes' batches
    ],
)
def test_held_out_figures_are_those_of_one_process(runs: Path, name: str, figures: list[str]) -> None:
    """Although their rows do not make full batches."""
    for key in (f"eval_{figure}" for figure in figures):
        assert steps(runs / f"two_{name}", key) == pytest.approx(steps(runs / f"one_{name}", key), rel=1e-4), key


def test_samples_are_those_of_one_process(runs: Path) -> None:
    one, two = (lines(runs / f"{run}_full" / "samples.jsonl") for run in ("one", "two"))
    assert [(line["when"], line["prompt"]) for line in two] == [(line["when"], line["prompt"]) for line in one]
    # Losses differ by rounding, and with them what a model of random weights says, and whether it says anything.
    assert all("completion" in line for line in two)


@pytest.mark.parametrize(
    "run", [*(f"two_{name}" for name in launched.RECIPES), *(f"ep_{name}" for name in launched.BY_EXPERTS)]
)
def test_all_weights_are_shared(runs: Path, run: str) -> None:
    """No silent data parallelism: every parameter, adapters too, is a DTensor; experts on the processes of `ep`."""
    meshes = json.loads((runs / f"{run}.meshes.json").read_text())
    assert meshes and all(meshes.values()), [parameter for parameter, axes in meshes.items() if not axes]
    by_ep = {name for name, axes in meshes.items() if "ep" in axes}
    assert by_ep == {name for name in meshes if run.startswith("ep") and name.endswith(("gate_up_proj", "down_proj"))}


@pytest.mark.parametrize("name", ["full", "lora", "chosen"])
def test_the_result_loads_strictly_and_is_that_of_one_process(runs: Path, tmp_path: Path, name: str) -> None:
    found = {}
    for run in ("one", "two", "ep"):
        final = runs / f"{run}_{name}" / "final"
        if name != "full":
            merge_lora(final, tmp_path / run)
            final = tmp_path / run
        found[run] = weights(DeepseekV2ForCausalLM.from_pretrained(final, dtype=torch.float32))
    for run in ("two", "ep"):
        assert found["one"].keys() == found[run].keys()
        for key, value in found["one"].items():
            torch.testing.assert_close(found[run][key], value, atol=2e-3, rtol=1e-2, msg=f"{run}_{name}: {key}")


def test_an_adapter_on_embeddings_is_saved_whole(runs: Path) -> None:
    """KTO goes on with that of DPO."""
    for name in ("dpo", "kto"):
        one, two = (load_adapter_file(runs / f"{run}_{name}" / "final") for run in ("one", "two"))
        assert one.keys() == two.keys() and any(name.endswith("embed_tokens.base_layer.weight") for name in two)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=2e-3, rtol=1e-2, msg=f"{name}: {key}")


def test_there_are_reward_statistics(runs: Path) -> None:
    assert (runs / "two_reward" / "final" / "reward_stats.json").is_file()


@pytest.mark.parametrize(
    ("resumed", "whole"),
    [
        ("two_again", "two_full"),
        ("rl_again", "two_rl_lora"),
        ("lora_again", "ep_lora"),  # resumed without ep
        ("one_to_two_full", "one_full"),
        ("one_to_two_lora", "one_lora"),
        ("two_to_one_full", "two_full"),
        ("two_to_one_lora", "two_lora"),
        ("one_to_two_to_one_full", "one_full"),
        ("one_to_two_to_one_lora", "one_lora"),
        ("one_to_two_to_one_chosen", "one_chosen"),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, resumed: str, whole: str) -> None:
    assert steps(runs / resumed) == pytest.approx(steps(runs / whole), rel=1e-5)
    assert len(steps(runs / resumed)) == (3 if "rl" in whole else 4)
    manifest = json.loads((runs / resumed / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert len(manifest["resumed"]) == (2 if "to_two_to_one" in resumed else 1)


@pytest.mark.parametrize("name", ["full", "lora", "chosen", "reward"])
def test_a_checkpoint_merges_to_what_final_merges_to(runs: Path, tmp_path: Path, name: str) -> None:
    run, found = runs / f"two_{name}", {}
    for source in ("checkpoint-4", "final"):
        assert main(["merge", str(run / source), str(tmp_path / source)]) == 0
        found[source] = load_file(tmp_path / source / "model.safetensors")
        assert (tmp_path / source / "README.md").is_file()
    assert found["checkpoint-4"].keys() == found["final"].keys()
    assert all(torch.equal(found["checkpoint-4"][key], value) for key, value in found["final"].items())
    configs = [json.loads((tmp_path / source / "config.json").read_text()) for source in found]
    assert configs[0] == configs[1]
    files = [sorted(path.name for path in (tmp_path / source).iterdir()) for source in found]
    assert files[0] == [name for name in files[1] if name != "reward_stats.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "final"]


def test_an_adapter_of_a_checkpoint_is_exported_and_imported_like_that_of_final(runs: Path, tmp_path: Path) -> None:
    checkpoint, final = runs / "ep_lora" / "checkpoint-4", runs / "ep_lora" / "final"
    for source in (checkpoint, final):
        assert main(["export", str(source), str(tmp_path / f"for_vllm_{source.name}"), "--kv-b"]) == 0
    assert main(["import", str(checkpoint), str(tmp_path / "whole")]) == 0
    pairs = [(tmp_path / "whole", final), (tmp_path / f"for_vllm_{checkpoint.name}", tmp_path / "for_vllm_final")]
    for own, expected in (map(load_adapter_file, pair) for pair in pairs):
        assert own.keys() == expected.keys() and all(torch.equal(own[key], value) for key, value in expected.items())


def load_adapter_file(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_checkpoint_with_a_missing_part_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shutil.copytree(runs / "two_lora" / "checkpoint-4", tmp_path / "checkpoint-4")
    assert main(["chat", str(checkpoint), "--prompt", "a"]) == 2
    assert f"dsv2 merge {checkpoint} OUT_DIR" in capsys.readouterr().err
    sorted((checkpoint / "shards").iterdir())[-1].unlink()
    assert main(["merge", str(checkpoint), str(tmp_path / "out")]) == 2
    assert "safetensors is missing; put it back" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ([], "parallel.fsdp is 2 and there is one process, which it must divide: start 2 or a multiple"),
        (["parallel={fsdp: 4, ep: 3}"], "ep is 3 and must divide fsdp, which is 4: use 1, 2, 4"),
        (["parallel={fsdp: 12, ep: 3}"], "parallel.ep is 3 and the model has 8 routed experts"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(
    runs: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], fault: str
) -> None:
    command = "check" if overrides else "sft"  # a run says first that there is one process
    assert main([command, str(runs / "two_full.yaml"), "output_dir=none", *overrides]) == 2
    assert fault in capsys.readouterr().err
    assert not (runs / "none").exists()
