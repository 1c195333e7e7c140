"""Merging on disk: the result is what stock makes of base and adapter, and it is there whole or not at all."""

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as stock

from deepseek_v2_modeling import ModelError, export_adapter, lora_config, merge_lora
from deepseek_v2_modeling.checkpoints import tensor_files
from deepseek_v2_modeling.checkpoints.sources import copy_side_files
from deepseek_v2_modeling.loading import (
    LoraSettings,
    ModelSource,
    load_base,
    load_model,
    prepare_trainable,
    save_directory,
)

from ..helpers.adapters import EVERYWHERE, IDS, edit_config, edit_tensors, make_adapter, make_base, stock_adapter
from ..helpers.models import logits_of, random_adapter, shake, stock_twin, tokenizer
from ..helpers.stages import byte_tokenizer, score_model

ROOT = Path(__file__).parents[2]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    make_adapter(tmp_path / "adapter", base)
    return tmp_path / "adapter"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


# The same logits


@pytest.mark.parametrize(
    ("targets", "settings", "changes"),
    [
        (EVERYWHERE, {}, {}),
        (EVERYWHERE, {"r": {t: i + 1 for i, t in enumerate(EVERYWHERE)}, "alpha": 5}, {}),
        (("attention", "experts"), {"r": {"attention": 3, "experts": 2}, "rslora": True}, {"q_lora_rank": 12}),
        (("experts.down", "dense"), {}, {"n_shared_experts": None, "first_k_dense_replace": 2}),
        (("experts.gate_up", "embeddings", "lm_head"), {}, {}),
    ],
)
def test_the_logits_of_stock_peft(tmp_path: Path, targets: tuple[str, ...], settings: Any, changes: Any):
    shared = {"n_shared_experts": 2} if "n_shared_experts" not in changes else {}
    base = make_base(tmp_path / "base", **{**shared, **changes})
    ours = make_adapter(tmp_path / "adapter", base, targets, **settings)
    report = merge_lora(tmp_path / "adapter", tmp_path / "merged")
    found = logits_of(load_base(str(tmp_path / "merged")), IDS)
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)
    assert (found - logits_of(load_base(str(base)), IDS)).abs().max() > 1e-2
    assert report.tensors == len(tensors_of(base)) and report.shards == 1
    if changes.get("n_shared_experts", 2):  # stock cannot do without
        torch.testing.assert_close(logits_of(stock_twin(tmp_path / "merged"), IDS), ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(stock_adapter(base, tmp_path / "adapter"), ours, rtol=0, atol=1e-5)


def test_shards_stay_shards(tmp_path: Path):
    base = make_base(tmp_path / "base", max_shard_size="40KB")
    ours = make_adapter(tmp_path / "adapter", base)
    report = merge_lora(tmp_path / "adapter", tmp_path / "merged")
    assert report.shards == len(list(base.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits_of(stock_twin(tmp_path / "merged"), IDS), ours, rtol=0, atol=1e-5)
    index, before = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (tmp_path / "merged", base))
    assert index["weight_map"].keys() == before["weight_map"].keys()
    assert index["metadata"]["total_size"] == before["metadata"]["total_size"]


@pytest.mark.parametrize("base_size", ["40KB", "5GB"])
def test_shards_of_another_size(tmp_path: Path, base_size: str):
    """The base's files are joined and split, in its order; a tensor that is larger has a file of its own."""
    base = make_base(tmp_path / "base", max_shard_size=base_size)
    ours = make_adapter(tmp_path / "adapter", base, (*EVERYWHERE, "embeddings"))
    report = merge_lora(tmp_path / "adapter", tmp_path / "merged", shard_size=9000)
    torch.testing.assert_close(logits_of(stock_twin(tmp_path / "merged"), IDS), ours, rtol=0, atol=1e-5)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    sizes = [[tensor.nbytes for tensor in load_file(path).values()] for path in files]
    assert len(files) == report.shards and all(sum(size) <= 9000 or len(size) == 1 for size in sizes)
    assert all(sum(size) + max(after) > 9000 for size, after in itertools.pairwise(sizes))  # none could take more
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert merge_lora(tmp_path / "merged", tmp_path / "whole", shard_size=10**9).shards == 1
    for name, tensor in tensors_of(tmp_path / "whole").items():
        assert torch.equal(tensor, tensors_of(tmp_path / "merged")[name])


def test_fused_experts_come_apart(tmp_path: Path):
    """As stock saves a model that it did not make itself."""
    base = make_base(tmp_path / "base")
    ours = make_adapter(tmp_path / "adapter", base)
    state = {name: tensor.contiguous() for name, tensor in load_base(str(base)).state_dict().items()}
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    merge_lora(tmp_path / "adapter", tmp_path / "merged")
    assert EXPERT in tensors_of(tmp_path / "merged")
    torch.testing.assert_close(logits_of(stock_twin(tmp_path / "merged"), IDS), ours, rtol=0, atol=1e-5)


def test_a_run_and_what_goes_with_it(base: Path, adapter: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    adapter.rename(tmp_path / "run" / "final")
    (tmp_path / "run" / "manifest.json").write_text("{}")
    (tmp_path / "run" / "final" / "chat_template.jinja").write_text("{{ messages }}")
    (base / "generation_config.json").write_text('{"temperature": 0.3}')
    released = {**json.loads((base / "config.json").read_text()), "auto_map": {"AutoModel": "modeling.DeepseekV2"}}
    (base / "config.json").write_text(json.dumps(released))
    merge_lora(tmp_path / "run", tmp_path / "merged")
    merged = tmp_path / "merged"
    assert (merged / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((merged / "generation_config.json").read_text()) == {"temperature": 0.3}
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_scaling"]["type"] == "yarn" and config["rope_theta"] == 10000.0
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["architectures"] == ["DeepseekV2ForCausalLM"] and "auto_map" not in config
    assert not (merged / "adapter_config.json").exists()


def test_types(tmp_path: Path):
    """bfloat16 stays or becomes float32; each number is rounded once, from a float32 sum."""
    base = make_base(tmp_path / "base")
    state = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    make_adapter(tmp_path / "adapter", base)
    merge_lora(tmp_path / "adapter", tmp_path / "kept")
    merge_lora(tmp_path / "adapter", tmp_path / "wide", dtype="float32")
    kept, wide = tensors_of(tmp_path / "kept"), tensors_of(tmp_path / "wide")
    assert {t.dtype for t in kept.values()} == {torch.bfloat16} and {t.dtype for t in wide.values()} == {torch.float32}
    assert all(torch.equal(kept[name], wide[name].bfloat16()) for name in wide)
    assert not torch.equal(wide[EXPERT], state[EXPERT].float())
    assert torch.equal(kept["model.norm.weight"], state["model.norm.weight"])
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_a_whole_model_is_written_again(tmp_path: Path, shard: str):
    """What full fine-tuning leaves needs no merge, but perhaps another type."""
    make_base(tmp_path / "run" / "final", max_shard_size=shard)
    (tmp_path / "run" / "manifest.json").write_text("{}")
    own = tensors_of(tmp_path / "run" / "final")
    report = merge_lora(tmp_path / "run", tmp_path / "kept")
    merge_lora(tmp_path / "run", tmp_path / "half", dtype="bfloat16")
    kept, half = tensors_of(tmp_path / "kept"), tensors_of(tmp_path / "half")
    assert kept.keys() == half.keys() == own.keys() and report.tensors == len(own) and report.adapted == 0
    assert all(torch.equal(kept[name], own[name]) and torch.equal(half[name], own[name].bfloat16()) for name in own)
    assert logits_of(stock_twin(tmp_path / "kept"), IDS).shape == (2, 12, 61)
    assert (tmp_path / "kept" / "tokenizer.json").is_file() and not (tmp_path / "kept" / "manifest.json").exists()
    last = sorted((tmp_path / "run" / "final").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-4])
    refuse("cut short", tmp_path / "run", tmp_path / "out")


def test_a_whole_reward_model_is_written_again(tmp_path: Path):
    score_model(num_labels=2).save_pretrained(tmp_path / "final")
    (tmp_path / "final" / "reward_stats.json").write_text('{"mean": 1}')
    byte_tokenizer().save_pretrained(tmp_path / "final")
    merge_lora(tmp_path / "final", tmp_path / "copy")
    own, copy = tensors_of(tmp_path / "final"), tensors_of(tmp_path / "copy")
    assert own.keys() == copy.keys() and all(torch.equal(copy[name], own[name]) for name in own)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["architectures"] == [
        "DeepseekV2ForSequenceClassification"
    ]
    assert (tmp_path / "copy" / "reward_stats.json").is_file()


def test_reward_model(base: Path, tmp_path: Path):
    source = ModelSource(str(base))
    lora = LoraSettings(targets=("attention", "experts"), r=2)
    model: Any = prepare_trainable(source, lora=lora, merge_dir=tmp_path / "m", head="score").eval()
    shake(model, 5)
    save_directory(model, tokenizer(), tmp_path / "reward")
    (tmp_path / "reward" / "reward_stats.json").write_text("{}")
    report = merge_lora(tmp_path / "reward", tmp_path / "merged")
    assert report.left_out == ("lm_head.weight",) and report.replaced == 1
    assert (tmp_path / "merged" / "reward_stats.json").is_file()
    with pytest.raises(ModelError, match=r"score\.weight.*dsv2 merge"):
        export_adapter(tmp_path / "reward", tmp_path / "served")
    twin = stock_twin(tmp_path / "merged", stock.DeepseekV2ForSequenceClassification)
    assert twin.config.num_labels == 1
    torch.testing.assert_close(logits_of(twin, IDS), logits_of(model, IDS), rtol=0, atol=1e-5)
    again = load_model(ModelSource(str(tmp_path / "merged")), head="score")
    torch.testing.assert_close(logits_of(again, IDS), logits_of(model, IDS), rtol=0, atol=1e-5)


# Refusals: nothing is written


def refuse(match: str, adapter: Path, out: Path, **arguments: Any) -> None:
    with pytest.raises(ModelError, match=match):
        merge_lora(adapter, out, **arguments)
    assert not out.exists() and not [path for path in out.parent.iterdir() if "tmp" in path.name]


def test_directory_that_is_not_empty(adapter: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ModelError, match="not empty"):
        merge_lora(adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    merge_lora(adapter, tmp_path / "out")


def test_no_adapter_and_no_base(base: Path, adapter: Path, tmp_path: Path):
    refuse("no such directory", tmp_path / "nowhere", tmp_path / "out")
    refuse("float8 .* is not one of|not one of", adapter, tmp_path / "out", dtype="float8")
    edit_config(adapter, base_model_name_or_path=str(tmp_path / "gone" / "far" / "away"))
    refuse("gone/far/away does not exist", adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"bias": "all"}, "bias"),
        ({"r": 7}, "shape"),
    ],
)
def test_another_kind_of_adapter(adapter: Path, tmp_path: Path, change: dict[str, Any], match: str):
    edit_config(adapter, **change)
    refuse(match, adapter, tmp_path / "out")


def test_tensors_that_do_not_fit(base: Path, adapter: Path, tmp_path: Path):
    lost = "base_model.model.model.layers.2.mlp.gate.lora_B.weight"
    edit_tensors(adapter, drop=[lost])
    refuse(f"missing: {re.escape(lost)}", adapter, tmp_path / "out")
    make_adapter(tmp_path / "again", base)
    state = load_file(base / "model.safetensors")
    for name, changed, match in (
        (EXPERT, None, f"1 tensors are missing: {re.escape(EXPERT)}"),
        (EXPERT, torch.zeros(3, 3), r"misshapen: .*\[3, 3\], not \[12, 32\]"),
        (EXPERT, state[EXPERT].to(torch.int8), "I8: quantised"),
        (EXPERT, state[EXPERT] / 0, "contains NaN or infinite"),
        ("model.layers.9.more", torch.zeros(1), "unexpected: model.layers.9.more"),
    ):
        put = {} if changed is None else {name: changed}
        kept = {n: t for n, t in state.items() if n != name}
        save_file(kept | put, base / "model.safetensors", metadata={"format": "pt"})
        refuse(match, tmp_path / "again", tmp_path / "out")


def test_files_cut_short_or_missing(tmp_path: Path):
    base = make_base(tmp_path / "base", max_shard_size="40KB")
    make_adapter(tmp_path / "adapter", base)
    shard = sorted(base.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    refuse(f"{shard.name}: .*cut short", tmp_path / "adapter", tmp_path / "out")
    shard.unlink()
    refuse(f"{shard.name} is missing", tmp_path / "adapter", tmp_path / "out")


# Whole or not at all


def test_too_little_room(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refuse("needs .* GB, but its disk has 0.00 GB free", adapter, tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_stopped_in_the_middle(adapter: Path, tmp_path: Path, error: BaseException):
    seen = []

    def progress(nbytes: int, total: int) -> None:
        seen.append(nbytes)
        if sum(seen) > total / 2:
            assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == [".out.tmp"]
            raise error

    with pytest.raises(ModelError if isinstance(error, OSError) else KeyboardInterrupt):
        merge_lora(adapter, tmp_path / "out", progress=progress)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    seen.clear()
    merge_lora(adapter, tmp_path / "out", progress=lambda nbytes, total: seen.append((nbytes, total)))
    assert sum(nbytes for nbytes, _ in seen) == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())


KILLED = """
import sys, time
from deepseek_v2_modeling import merge_lora
def progress(nbytes, total, seen=[0]):
    seen[0] += nbytes
    if seen[0] > total / 2:
        print("half", flush=True)
        time.sleep(60)
merge_lora(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_killed_in_the_middle(adapter: Path, tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(adapter), str(tmp_path / "out")],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.tmp").is_dir()
    merge_lora(adapter, tmp_path / "out")
    assert not (tmp_path / ".out.tmp").exists()
    stock_twin(tmp_path / "out")


MEASURED = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from deepseek_v2_modeling import merge_lora
def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
small, large, out = sys.argv[1:]
merge_lora(small, out + "-small")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS")
merge_lora(large, out)
print(status("VmHWM") - before)
"""


def test_memory_is_at_most_twice_the_largest_shard(base: Path, adapter: Path, tmp_path: Path):
    large = {"vocab_size": 16000, "hidden_size": 256, "moe_intermediate_size": 160, "n_routed_experts": 64}
    big = make_base(tmp_path / "big", max_shard_size="40MB", **large, num_hidden_layers=4, n_group=4)
    sizes = [path.stat().st_size for path in big.glob("*.safetensors")]
    assert sum(sizes) > 1e8 and len(sizes) > 2
    config = lora_config(("attention", "experts", "dense"), r=4)
    model: Any = random_adapter(load_base(str(big)), config)
    save_directory(model, tokenizer(), tmp_path / "large")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(adapter), str(tmp_path / "large"), str(tmp_path / "out")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    assert grown < 2 * max(sizes), (grown / 1e6, max(sizes) / 1e6)


def test_a_place_that_cannot_be_written(adapter: Path, tmp_path: Path):
    """One message, and no trace."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"out: cannot be written \(Not a directory\); nothing was left there"):
        merge_lora(adapter, tmp_path / "file" / "out")


def test_into_the_working_directory(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge_lora(adapter, ".")
    assert (tmp_path / "here" / "config.json").is_file()


def test_reward_statistics_of_the_base_stay_there(tmp_path: Path):
    """They belong to its score head, which an SFT adapter's merged model has not."""
    own, base, out = (tmp_path / name for name in ("own", "base", "out"))
    for directory in (own, base, out):
        directory.mkdir()
    (base / "reward_stats.json").write_text("{}")
    copy_side_files(own, base, out)
    assert not list(out.iterdir())
    (own / "reward_stats.json").write_text("{}")
    copy_side_files(own, base, out)
    assert [path.name for path in out.iterdir()] == ["reward_stats.json"]
