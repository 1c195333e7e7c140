"""`dsv2 merge`, `export` and `import`: one line for what was done, one for what is wrong."""

import re
from pathlib import Path

import pytest

from recipes.cli import main

from ..helpers.adapters import make_adapter, make_base


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of an SFT run, whose path and base the command line names as they stand there."""
    monkeypatch.chdir(tmp_path)
    make_base(Path("base"))
    make_adapter(Path("run/final"), Path("base"))
    return Path("run")


def test_out_and_back(adapter: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["merge", "run", "merged", "--dtype", "bfloat16"]) == 0
    assert re.fullmatch(r"merged: 83 tensors in 1 file, 0\.\d+ MB, 71 adapted\n", capsys.readouterr().out)
    assert main(["export", "run", "served", "--layout", "per_expert", "--kv-b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"served: \d+ pairs, rank 2, 0\.\d+ MB", lines[0])
    assert lines[1].startswith("note: vLLM") and all(line.startswith("note: ") for line in lines[1:])
    assert main(["import", "served", "back", "--base", "base"]) == 0
    assert capsys.readouterr().out.startswith("back: 54 tensors from one pair for each expert, ")


def test_the_size_of_files(adapter: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["merge", "run", "merged", "--shard-size", "20KB", "--dtype", "float16"]) == 0
    found = re.fullmatch(r"merged: 83 tensors in (\d+) files, 0\.\d+ MB, 71 adapted\n", capsys.readouterr().out)
    assert found and int(found[1]) == len(list(Path("merged").glob("*.safetensors"))) > 2
    for wrong in ("large", "0GB", "-1GB", "1e999GB"):
        assert main(["merge", "run", "again", f"--shard-size={wrong}"]) == 2
        assert f"{wrong!r} is not a size, such as 5GB or 500MiB" in capsys.readouterr().err


def test_a_whole_model_is_copied(adapter: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["merge", "base", "copy", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"copy: 83 tensors in 1 file, 0\.\d+ MB, copied from a full model, which has no adapter\n", said
    )


def test_settings_that_stock_computes_differently_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    make_base(Path("base"), norm_topk_prob=True)
    make_adapter(Path("run/final"), Path("base"))
    for words in (["merge", "run", "merged"], ["merge", "base", "copy"], ["export", "run", "served", "--kv-b"]):
        assert main(words) == 0
        warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == 1 and warnings[0].startswith("warning: norm_topk_prob is true: stock transformers")


def test_what_needs_no_import_is_copied(adapter: Path, capsys: pytest.CaptureFixture[str]):
    make_adapter(Path("plain"), Path("base"), ("attention",))
    assert main(["export", "plain", "served", "--kv-b"]) == 0
    capsys.readouterr()
    assert main(["import", "served", "back"]) == 0
    assert "24 tensors from a layout that is PEFT's as well" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "run", "base"], "base already exists and is not empty; choose another directory"),
        (["export", "base", "out"], "base: not an adapter"),
        (["export", "run", "out"], "run/final: vLLM drops adapters on kv_b_proj under MLA"),
        (["merge", "nowhere", "out"], "nowhere: no such directory"),
        (["merge", "run", "out", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (["merge", "run"], "the following arguments are required: OUT_DIR"),
        (["export", "run", "out", "--layout", "fused"], 'unknown layout "fused": use per_expert'),
        (["import", "run", "out"], "run/final is in PEFT's layout already"),
        (["import", "run", "out", "--base", "a/b/c"], "a/b/c: this base model does not exist"),
    ],
)
def test_what_is_wrong_ends_with_2(
    adapter: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
    assert captured.out == "" and not Path("out").exists()
