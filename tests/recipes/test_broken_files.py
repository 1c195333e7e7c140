"""Files that a command reads, with one value or some bytes broken: exit code 0 or 2, one message, nothing half-written.

`DSV2_WIDE=N` tries N broken files in place of a few.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from recipes.cli import main

from ..helpers.broken_recipes import RECIPES, make_world
from ..helpers.stages import conversations

TRIES = int(os.environ.get("DSV2_WIDE", 0)) or 36
STEERING = set("\x1b\x07")
JUNK: list[Any] = [
    None, True, -1, 0, 1, 1.5, 10**12, 10**30, float("nan"), "", "x", "../x", "\ud800", "\0", "\x1b[31m", [], [None],
    [1], ["x"], [[]], {}, {"a": None}, {"a": {"b": [1]}}, "9" * 5000,
]  # fmt: skip
BYTES = [
    b"",
    b"[]",
    b"null",
    b'"x"',
    b"{}",
    b"1",
    b"\0" * 9,
    b"[" * 100_000,
    b"- a\n",
    b"a: &a [*a]",
    b"\xff\xfe",
    b"NaN",
]
CHAT = ("--prompt", "hi", "--max-new-tokens", "2")
# Each: a directory, files in it, commands that read them.
TARGETS: list[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]] = [
    (
        "adapter",
        ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        (
            ("chat", "adapter", *CHAT), ("merge", "adapter", "o"), ("export", "adapter", "o"),
            ("import", "adapter", "o"), ("check", "on_adapter.yaml"), ("sft", "on_adapter.yaml"),
        ),
    ),
    (
        "model",
        ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
        (("chat", "model", *CHAT), ("merge", "model", "o"), ("check", "on_model.yaml"), ("sft", "on_model.yaml")),
    ),
    (
        "scorer",
        ("final/reward_stats.json", "final/adapter_config.json", "final/adapter_model.safetensors", "manifest.json"),
        (("check", "with_scorer.yaml"), ("rl", "with_scorer.yaml")),
    ),
    (
        "ended",
        ("manifest.json", "metrics.jsonl", "samples.jsonl", "recipe.yaml", "final/adapter_config.json"),
        (("report", "run"), ("sft", "sft.yaml"), ("check", "sft.yaml"), ("chat", "run", *CHAT)),
    ),
    (
        "stopped",
        (
            "manifest.json", "metrics.jsonl", "recipe.yaml", "checkpoint-1/trainer_state.json",
            "checkpoint-1/checksums.json", "checkpoint-1/adapter_config.json", "checkpoint-1/optimizer.pt",
        ),
        (("sft", "sft.yaml"), ("report", "run")),
    ),
    (
        "measured",
        ("manifest.json", "samples.jsonl", "results.json", "recipe.yaml"),
        (("report", "figures"), ("eval", "eval.yaml")),
    ),
    (
        "chained",
        ("chain.json", "results.json", "manifest.json", "recipe.yaml", "sft/manifest.json", "eval_sft/manifest.json",
         "eval_sft/samples.jsonl", "sft/metrics.jsonl"),
        (("report", "chain"), ("run", "chain.yaml"), ("check", "chain.yaml")),
    ),
    ("chosen", ("experts.json",), (("check", "on_experts.yaml"),)),
    ("saved", ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"), (("check", "on_saved.yaml"),)),
]  # fmt: skip
PLACE = {"ended": "run", "stopped": "run", "measured": "figures", "chained": "chain"}  # where a directory is copied to
EXPERTS = {"targets": ["experts"], "r": 2, "experts_file": "chosen/experts.json"}


def write_recipe(name: str, kind: str, **changes: Any) -> str:
    Path(f"{name}.yaml").write_text(json.dumps({**RECIPES[kind], "output_dir": "o", **changes}))
    return f"{name}.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of every kind, under `whole`, and recipes that read their copies."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sft.stage.SAMPLE_TOKENS", 2)
        training = {**RECIPES["sft"]["training"], "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        assert main(["sft", write_recipe("sft", "sft", output_dir="run", training=training)]) == 0
        assert main(["reward", write_recipe("reward", "reward", output_dir="whole/scorer")]) == 0
        assert main(["eval", write_recipe("eval", "eval", output_dir="figures")]) == 0
        assert main(["run", write_recipe("chain", "chain", output_dir="chain")]) == 0
        for name, place in PLACE.items():
            shutil.copytree(place, f"whole/{name}")
        shutil.copytree("run/final", "whole/adapter")
        shutil.copytree("base", "whole/model")
        for name in ("final", "checkpoint-2"):
            shutil.rmtree(f"whole/stopped/{name}")
        manifest = Path("whole/stopped/manifest.json")
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "status": "stopped"}))
        Path("whole/chosen").mkdir()
        Path("whole/chosen/experts.json").write_text(json.dumps({"experts": {"1": [0, 1]}, "shared_experts": False}))
        Dataset.from_list(conversations(4)).save_to_disk("whole/saved")
        write_recipe("on_adapter", "sft", model={"path": "adapter"})
        write_recipe("on_model", "sft", model={"path": "model"})
        write_recipe("with_scorer", "rl", rewards=[{"model": "scorer"}])
        write_recipe("on_experts", "sft", lora=EXPERTS)
        write_recipe("on_saved", "sft", data=[{"path": "saved"}])
    return folder


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node[:20]) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _with_junk(value: Any, rng: random.Random) -> Any:
    """JSON with a value replaced, taken out or added; those near the top as often as all others."""
    places = list(_places(value))
    if not places:
        return rng.choice(JUNK)
    near = [place for place in places if len(place) == 1]
    *parents, key = rng.choice(near if rng.random() < 0.5 else places)
    node = value
    for parent in parents:
        node = node[parent]
    if rng.random() < 0.2:
        node.pop(key)
    else:
        node[key] = rng.choice(JUNK)
    return value


def _with_other_bytes(data: bytes, rng: random.Random) -> bytes:
    at, near = rng.randrange(len(data) + 1), rng.randrange(min(len(data), 300) + 1)
    return rng.choice(
        [data[:at], data[:near] + rng.choice(BYTES) + data[near:], rng.choice(BYTES), data[:near] + data[at:],
         data + rng.choice(BYTES), data[:near] + bytes([rng.randrange(256)]) + data[near + 1 :]]
    )  # fmt: skip


def break_file(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if rng.random() < 0.3:
        path.write_bytes(_with_other_bytes(data, rng))
    elif path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(_with_junk(json.loads(data[8 : 8 + length]), rng)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    elif path.suffix == ".json":
        path.write_text(json.dumps(_with_junk(json.loads(data), rng)))
    elif path.suffix == ".yaml":
        path.write_text(json.dumps(_with_junk(yaml.safe_load(data), rng)))
    elif path.suffix == ".jsonl" and data:
        lines = data.splitlines()
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(_with_junk(json.loads(lines[number]), rng)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.write_bytes(_with_other_bytes(data, rng))


@pytest.mark.parametrize("seed", range(TRIES))
def test_a_broken_file_is_read_or_refused(
    world: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    name, files, commands = TARGETS[seed % len(TARGETS)]
    monkeypatch.chdir(world)
    monkeypatch.setattr("sft.stage.SAMPLE_TOKENS", 2)
    monkeypatch.setattr("recipes.runs.prepare.rehearse", lambda *_: None)
    place = PLACE.get(name, name)
    for path in (Path(place), Path("o"), *world.glob(".o*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.copytree(f"whole/{name}", place)
    break_file(Path(place, rng.choice(files)), rng)
    command = rng.choice(commands)
    capsys.readouterr()
    code = main([*command])
    said = capsys.readouterr()
    assert code in (0, 2) and "Traceback" not in said.out + said.err, said.err
    assert sum(line.startswith("error: ") for line in said.err.splitlines()) == (code == 2), said.err
    assert not STEERING & set(said.out + said.err)
    assert code == 0 or command[-1] != "o" or not Path("o").exists()
