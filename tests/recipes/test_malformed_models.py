"""Files of a model directory that are no model's: one line that names file, key and value, whatever stands in them."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepseek_v2_modeling.adapters.lora import apply_lora, lora_config
from deepseek_v2_modeling.errors import ModelError
from deepseek_v2_modeling.loading import check_weights, load_base, read_settings
from recipes.cli import main
from recipes.runs.new_model import make_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "base"
    make_model(folder, "tiny", 0)
    return folder


@pytest.fixture
def error_line(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., str]:
    """The one line of a command that ends with exit code 2, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_model, "m")

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main([*words]) == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(("o", ".o.tmp"))]
        return err.strip().splitlines()[-1]

    return run


def edit(file: str, **changes: Any) -> None:
    path = Path("m", file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CHAT, MERGE = ("chat", "m", "--prompt", "Hi", "--max-new-tokens", "1"), ("merge", "m", "o")
VALUES: dict[str, Any] = {
    "hidden_size": -64,
    "num_attention_heads": 0,
    "vocab_size": 0,
    "n_shared_experts": -1,
    "max_position_embeddings": 0,
    "rms_norm_eps": -1.0,
    "attention_dropout": 2.0,
    "pad_token_id": 99_999,
    "hidden_act": "banana",
    "architectures": [None],
    "dtype": "float33",
    "id2label": "x",
    "num_labels": "x",
    "text_config": {"hidden_size": 64},
    "is_moe_layer": 1,
    "save_pretrained": "x",
    "rope": {},
    "return_dict": False,
    "output_attentions": True,
    "_attn_implementation": "banana",
    "quantization_config": "fp8",
    "compression_config": {"quant_method": "compressed-tensors"},
    "use_mla": 0,
}


@pytest.mark.parametrize("key", VALUES)
def test_values_of_a_config(error_line: Callable[..., str], key: str) -> None:
    edit("config.json", **{key: VALUES[key]})
    for command in (CHAT, MERGE):
        line = error_line(*command)
        assert line.startswith("error: m")
        assert key.strip("_").replace("compression", "quantization") in line


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("yarn", "rope_scaling is 'yarn'"),
        ({"type": "yarn", "factor": 0}, "rope_scaling.factor is 0"),
        ({"type": "yarn", "factor": "40"}, "rope_scaling.factor is '40'"),
        ({"type": "yarn", "factor": -4.0}, "rope_scaling.factor is -4.0"),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ({"type": "yarn", "factor": 4, "mscale": "x"}, "rope_scaling.mscale is 'x'"),
        ({"type": ["yarn"], "factor": 4}, "rope_scaling.type is ['yarn']"),
    ],
)
def test_values_of_rope(error_line: Callable[..., str], setting: Any, named: str) -> None:
    edit("config.json", rope_scaling=setting, rope_parameters=None)
    assert named in error_line(*CHAT)
    assert named in error_line(*MERGE)


@pytest.mark.parametrize("text", ["[]", "null", '"a"', "[" * 10**5, '{"hidden_size": 1' + "0" * 5000 + "}", "\0"])
def test_what_is_no_config(error_line: Callable[..., str], text: str) -> None:
    Path("m/config.json").write_text(text)
    assert "m/config.json" in error_line(*CHAT)
    assert "m/config.json" in error_line(*MERGE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("repetition_penalty", 0),
        ("repetition_penalty", "x"),
        ("num_beams", 4),
        ("num_return_sequences", 4),
        ("stop_strings", ["a"]),
        ("dola_layers", "high"),
        ("return_dict_in_generate", True),
        ("watermarking_config", {"x": 1}),
        ("bad_words_ids", [[99_999]]),
        ("sequence_bias", [[[99_999], 1.0]]),
        ("temperature", "hot"),
    ],
)
def test_values_of_a_generation_config(error_line: Callable[..., str], key: str, value: Any) -> None:
    edit("generation_config.json", **{key: value})
    recipe = {"stage": "sft", "model": {"path": "m"}, "data": [{"path": "tiny:sft_train?n=4"}], "output_dir": "run"}
    Path("sft.yaml").write_text(json.dumps(recipe))
    for command in (CHAT, ("check", "sft.yaml")):
        assert "m/generation_config.json" in error_line(*command)


@pytest.mark.parametrize("text", ["", "[]", "\0"])
def test_what_is_no_generation_config(error_line: Callable[..., str], text: str) -> None:
    Path("m/generation_config.json").write_text(text)
    assert "m/generation_config.json" in error_line(*CHAT)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"tokenizer_class": "BertTokenizer"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 3}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "x"}'),
        ("tokenizer_config.json", '{"a":' * 50_000 + "1" + "}" * 50_000),
    ],
)
def test_what_is_no_tokenizer(error_line: Callable[..., str], file: str, text: str) -> None:
    Path("m", file).write_text(text)
    assert error_line(*CHAT).startswith("error: m: no tokenizer can be loaded (")


def test_templates_that_fail_in_their_own_way(error_line: Callable[..., str]) -> None:
    Path("m/chat_template.jinja").write_text("{% for i in range(10**9) %}a{% endfor %}")
    assert "the model's own chat template rejects this conversation" in error_line(*CHAT)
    Path("m/chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "m/chat_template.jinja: not UTF-8" in error_line(*MERGE)


def split() -> dict[str, Any]:
    """The weights of `m` in two shards; returns their index, which is not written."""
    tensors = load_file(f"m/{WEIGHTS}")
    Path("m", WEIGHTS).unlink()
    names = sorted(tensors)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, f"m/{file}", {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    return index


@pytest.mark.parametrize("value", [3, None, "../base/model.safetensors", "config.json", ["a"], "absent.safetensors"])
def test_an_index_that_names_no_shards(error_line: Callable[..., str], value: Any) -> None:
    index = split()
    Path("m", INDEX).write_text(json.dumps({**index, "weight_map": dict.fromkeys(index["weight_map"], value)}))
    for command in (CHAT, MERGE):
        assert "index" in (line := error_line(*command)) or "absent.safetensors" in line


@pytest.mark.parametrize("text", ["[]", "x", "{}", '{"weight_map": ["a"]}', '{"weight_map": {}}', "[" * 10**5])
def test_what_is_no_index(error_line: Callable[..., str], text: str) -> None:
    split()
    Path("m", INDEX).write_text(text)
    for command in (CHAT, MERGE):
        assert f"m/{INDEX}" in error_line(*command)


def test_a_tensor_in_two_shards(error_line: Callable[..., str]) -> None:
    index = split()
    Path("m", INDEX).write_text(json.dumps(index))
    second = Path("m/model-00002-of-00002.safetensors")
    first = load_file("m/model-00001-of-00002.safetensors")
    name = min(first)
    save_file({**load_file(second), name: first[name] + 1}, second, {"format": "pt"})
    for command in (CHAT, MERGE):
        assert f"{name} is in another file of the model too" in error_line(*command)


def test_one_file_goes_before_shards_as_in_transformers(error_line: Callable[..., str], capsys: Any) -> None:
    whole = shutil.copy(f"m/{WEIGHTS}", "whole")
    Path("m", INDEX).write_text(json.dumps(split()))
    shutil.copy(whole, f"m/{WEIGHTS}")
    (shard := Path("m/model-00001-of-00002.safetensors")).write_bytes(shard.read_bytes()[:50])  # of another time
    assert main([*MERGE]) == 0
    assert "in 1 file" in capsys.readouterr().out
    assert main([*CHAT]) == 0


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.complex64]
)
def test_weights_that_are_no_numbers_as_they_are(error_line: Callable[..., str], dtype: torch.dtype) -> None:
    tensors = load_file(f"m/{WEIGHTS}")
    save_file({**tensors, GATE: tensors[GATE].to(dtype)}, f"m/{WEIGHTS}", {"format": "pt"})
    for command in (CHAT, MERGE):
        line = error_line(*command)
        assert GATE in line and "quantised" in line


def test_a_header_of_any_depth(error_line: Callable[..., str]) -> None:
    Path("m", WEIGHTS).write_bytes(struct.pack("<Q", 50_000) + b"[" * 50_000)
    for command in (CHAT, MERGE):
        assert f"m/{WEIGHTS}" in error_line(*command)


@pytest.fixture(scope="module")
def adapter(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: Any = apply_lora(load_base(str(base_model)), lora_config(("attention", "experts"), 2))
    model.save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "4"),
        ("r", 0),
        ("r", 10**9),
        ("lora_alpha", "8"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", {"q_proj": None}),
        ("rank_pattern", {"q_proj": 10**9}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("alpha_pattern", [1]),
    ],
)
def test_ranks_and_alphas_of_an_adapter(error_line: Callable[..., str], adapter: Path, key: str, value: Any) -> None:
    shutil.copytree(adapter, "a")
    config = json.loads(Path("a/adapter_config.json").read_text())
    Path("a/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "m", key: value}))
    for words in (("chat", "a", "--prompt", "Hi"), ("merge", "a", "o"), ("export", "a", "o"), ("import", "a", "o")):
        assert f"a/adapter_config.json: {key}" in error_line(*words)


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**30) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_a_config_is_read_or_refused(base_model: Path, tmp_path: Path, data: st.DataObject) -> None:
    config = json.loads((base_model / "config.json").read_text())
    key = data.draw(st.sampled_from([*sorted(config), "rope_scaling", "quantization_config", "head_dim", "to_dict"]))
    changed = {**config, key: data.draw(VALUE)}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    shutil.copy(base_model / WEIGHTS, tmp_path / WEIGHTS)
    try:
        found = read_settings(str(tmp_path))
        check_weights(str(tmp_path), found, "causal_lm")
        found.save_pretrained(tmp_path / "saved")
    except ModelError as error:
        assert str(error)


@pytest.mark.parametrize("command", [("chat", "--prompt", "hi"), ("merge", "out")])
def test_a_path_that_may_be_a_hub_name_is_said_not_to_be_here(tmp_path: Path, command: tuple[str, ...]) -> None:
    """In another process, since huggingface_hub reads the variable when it is imported."""
    words = [sys.executable, "-m", "recipes.cli", command[0], "runs/sft", *command[1:]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: runs/sft: no such directory, and no model of this")
