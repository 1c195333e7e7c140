"""What comes from other people's files must not run, steer the terminal, reach others or take for ever."""

import gzip
import io
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations.reading import data_file
from deepseek_v2_modeling.checkpoints.adapter_config import pattern_fault
from deepseek_v2_modeling.checkpoints.sources import is_hub_name
from recipes.chat.partner import _Streamer
from recipes.cli import main
from recipes.secret_keys import refuse_secrets, without_secrets
from recipes.terminal import printable, safe_terminal

ROOT = Path(__file__).parents[2]
SFT = ROOT / "recipes" / "tiny" / "sft.yaml"
ROWS = [{"prompt": f"say {i}", "completion": str(i)} for i in range(4)]
CODE = "import pathlib; pathlib.Path('ran').write_text('')\nclass Tokenizer: pass\nclass Config: pass\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model."""
    directory = tmp_path_factory.mktemp("safety") / "model"
    assert main(["init", str(directory), "--preset", "tiny"]) == 0
    return directory


@pytest.fixture(scope="module")
def run(tiny: Path) -> Path:
    """A run of two steps with adapters."""
    folder = tiny.parent
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["sft", *recipe(tiny, folder / "run"), "--smoke", "lora={targets: [attention], r: 2}"]) == 0
    return folder / "run"


def recipe(model: Path, output: Path) -> list[str]:
    rows = model.parent / "rows.jsonl"
    return [str(SFT), f"model.path={model}", f"data=[{{path: {rows}}}]", "eval_data=[]", f"output_dir={output}",
            "training.eval_strategy=no"]  # fmt: skip


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    code = main(arguments)
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1) and said.startswith("error: "), said
    return said


# --- code ----------------------------------------------------------------------------------------------------------


def model_with_code(tiny: Path, folder: Path) -> Path:
    model = folder / "model"
    shutil.copytree(tiny, model)
    (model / "code.py").write_text(CODE)
    edit_json(model / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Config"})
    return model


def test_code_of_a_tokenizer_is_never_run_and_never_asked_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_with_code(tiny, tmp_path)
    edit_json(
        model / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": ["code.Tokenizer", None]},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    assert "auto_map" in refused(["chat", str(model), "--max-new-tokens", "2"], capsys)
    assert sys.stdin.read() == "y\ny\n" and not Path("ran").exists()


def test_every_auto_class_is_told_not_to_trust_code() -> None:
    files = [path for room in ("conversations", "deepseek_v2_modeling", "eval", "recipes", "reward", "rl", "sft")
             for path in (ROOT / room).rglob("*.py")]  # fmt: skip
    calls = [
        line
        for path in files
        for line in path.read_text().splitlines()
        if "Auto" in line and ".from_pretrained(" in line
    ]
    assert calls and all("trust_remote_code=False" in line for line in calls)


def test_no_result_names_code_that_is_not_there(tiny: Path, run: Path, tmp_path: Path) -> None:
    model = model_with_code(tiny, tmp_path)
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    shutil.copy(tiny.parent / "rows.jsonl", tmp_path)
    assert main(["sft", *recipe(model, tmp_path / "full"), "--smoke", "lora=null"]) == 0
    assert main(["merge", str(model), str(tmp_path / "copy")]) == 0
    for directory in (tmp_path / "full" / "final", tmp_path / "copy"):
        assert (directory / "tokenizer_config.json").is_file()
        assert not [path for path in directory.rglob("*.json") if "auto_map" in path.read_text()]


@pytest.mark.parametrize("name", ["someone/kernel", "kernels-community/flash-attn@v1:f", "../x", "EAGER", ""])
def test_kernels_of_the_hub_are_refused(
    tiny: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["check", *recipe(tiny, tmp_path / "o"), f"model.attn_implementation='{name}'"], capsys)
    assert "model.attn_implementation: must be the name of an implementation" in said


def test_a_config_that_names_a_kernel_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", attn_implementation="someone/kernel")
    assert "someone/kernel" in refused(["chat", str(tmp_path / "m"), "--prompt", "a"], capsys)


# --- secrets -------------------------------------------------------------------------------------------------------

SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
SECRETS = [
    f"training.hub_token={SECRET}",
    "training.hub_token=my-own-word",
    "training.push_to_hub=true",
    "training.hub_model_id=my-own-word",
    "training.hub_anything=my-own-word",
    "HF_TOKEN=my-own-word",
    "env={WANDB_API_KEY: my-own-word}",
    f"training.run_name={SECRET}",
    "training.report_to={wandb: {api_key: my-own-word}}",
    f"data.0.path={SECRET}",
    "training.trackio_space_id=my-own-word",
    "model.config.password=my-own-word",
    "training.hub_token=[my-own-word",
    "training.model_init_kwargs={token: my-own-word}",
    "training.vllm_server_base_url=http://me:my-own-word@host:8000",
    "data.0.path=https://me:my-own-word@host/rows.jsonl",
    "data.0.path=https://host/rows.jsonl?a=1&access_token=my-own-word",
    "output_dir=s3://bucket/run?X-Amz-Signature=my-own-word",
]


@pytest.mark.parametrize("override", SECRETS)
def test_secrets_are_refused_by_name_and_neither_written_nor_shown(
    tiny: Path, override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("check", "sft"):
        said = refused([command, *recipe(tiny, tmp_path / "o"), override], capsys)
        assert SECRET not in said and "my-own-word" not in said
        assert "HF_TOKEN in the environment" in said or "not valid YAML" in said
        assert override.partition("=")[0] in said
    assert list(tmp_path.iterdir()) == []


def test_secrets_in_files_and_chains_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(SFT.read_text() + "\nhub_token: my-own-word\n")
    assert "my-own-word" not in refused(["check", str(tmp_path / "a.yaml")], capsys)
    chain = f"stage: chain\noutput_dir: {tmp_path / 'o'}\nstages:\n- {{name: a, recipe: a.yaml}}\n"
    (tmp_path / "chain.yaml").write_text(chain)
    for command in ("check", "run"):
        assert "HF_TOKEN" in refused([command, str(tmp_path / "chain.yaml")], capsys)
    assert not (tmp_path / "o").exists()


def test_secrets_in_wrong_commands_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "my-own-word" not in refused(["sft", str(SFT), "--hub_token=my-own-word"], capsys)


def test_words_that_end_like_secrets_are_none() -> None:
    refuse_secrets(
        {
            "training": {"eos_token": "<eos>", "max_tokens": 3, "report_to": "none"},
            "data": [{"columns": {"token": "a", "password": "b"}, "roles": {"secret": "user"}}],
            "model": {"config": {"pad_token_id": 0}, "path": "runs/hf_model"},
            "output_dir": "runs/a@b:c?keys=1&d=2",
            "vllm_server_base_url": "http://[::1]:8000/v1?n=2",
        }
    )
    assert without_secrets("training.eos_token: must be text") == "training.eos_token: must be text"


# --- the terminal --------------------------------------------------------------------------------------------------

STEERING = "\x1b]0;title\x07 \x9b31m \r \x00 \x7f \u202e \u2066 \u200f \u2028 \ud800"


def test_what_steers_a_terminal_is_written_out() -> None:
    assert printable("a\tb\nc \x1b[1m\x9b\u202e\ud800 é 你") == "a\tb\nc \\x1b[1m\\x9b\\u202e\\ud800 é 你"


@settings(max_examples=50)
@given(st.text())
def test_whatever_is_printed_cannot_steer_the_terminal(text: str) -> None:
    before = sys.stdout, sys.stderr
    sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    try:
        with safe_terminal():
            print(text, text, end="\n", flush=True)
            sys.stdout.writelines([text, "\n"])
            sys.stdout.flush()
        shown = sys.stdout.buffer.getvalue().decode()  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        sys.stdout, sys.stderr = before
    assert all((ord(c) >= 32 and not 127 <= ord(c) < 160) or c in "\n\t" for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\u2028\u2029")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_answer_is_streamed_without_escape_sequences_in_any_encoding(
    encoding: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Streamer, "put", lambda self, value: self.show(STEERING + " 你好"))
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["chat", str(tiny), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    out.flush()
    shown = out.buffer.getvalue().decode(encoding)  # pyright: ignore[reportAttributeAccessIssue]
    assert "\\x1b]0;title\\x07 \\x9b31m \\x0d \\x00 \\x7f \\u202e" in shown
    assert (
        not set(shown) & set("\x1b\x07\x9b\r\x00\x7f\u202e") and ("你好" if encoding == "utf-8" else "\\u4f60") in shown
    )


def test_keys_and_names_are_shown_without_escape_sequences(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty, steering = "\x1b]0;x\x07\u202e", "\x1b\x07\u202e"
    (tmp_path / f"e{nasty}.jsonl").write_text(json.dumps({f"{nasty}messages": 1}) + "\n")
    (tmp_path / f"r{nasty}.yaml").write_text('stage: sft\n"\\e]0;x\\a\\u202E": 1\n')
    for arguments in (
        ["check", *recipe(tiny, tmp_path / "o"), f"data=[{{path: '{tmp_path}/e\\e.jsonl'}}]"],
        ["check", str(SFT), f"training.{nasty}=1"],
        ["check", str(SFT), f"{nasty}"],
        ["check", str(tmp_path / f"r{nasty}.yaml")],
        ["chat", str(tmp_path / nasty)],
        [nasty],
        ["init", "x", "--preset", nasty],
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert not set(said.out + said.err) & set(steering) and "Traceback" not in said.err
    data = {"path": str(tmp_path / f"e{nasty}.jsonl")}
    assert main(["check", *recipe(tiny, tmp_path / "o"), f"data=[{json.dumps(data)}]"]) == 2
    said = capsys.readouterr().err
    assert not set(said) & set(steering) and "\\x1b]0;x\\x07\\u202e" in said


@pytest.mark.parametrize(
    ("encoding", "errors"), [("utf-8", "strict"), ("utf-8", "surrogateescape"), ("ascii", "strict")]
)
def test_input_in_another_encoding_is_one_line(
    encoding: str, errors: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "你好".encode("gbk") + b"\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), encoding=encoding, errors=errors))
    assert f"standard input is not valid {encoding.upper()}" in refused(
        ["chat", str(tiny), "--max-new-tokens", "2"], capsys
    )


def test_arguments_that_are_not_utf_8_are_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = os.fsdecode(b"\xff")
    assert "--prompt is not valid UTF-8" in refused(["chat", str(tiny), "--prompt", bad], capsys)
    assert "is not valid UTF-8" in refused(["sft", str(SFT), f"output_dir={tmp_path}/{bad}"], capsys)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_that_the_umask_says(umask: int, tiny: Path, run: Path, tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "m"), "--preset", "tiny"]) == 0
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    rows = "".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": 1}])
    (tmp_path / "rows.jsonl").write_text(rows)
    overrides = ["data.0.on_bad_row=skip", "training.save_strategy=steps", "training.save_steps=1"]
    lora, output = "null" if umask == 0o022 else "{targets: [attention], r: 2}", tmp_path / "run"
    assert main(["sft", *recipe(tmp_path / "m", output), "--smoke", f"lora={lora}", *overrides]) == 0
    assert main(["report", str(output)]) == 0
    names = {path.name for path in output.rglob("*")}
    assert names >= {"metrics.jsonl", "samples.jsonl", "rejected.jsonl", "manifest.json", "report.html", "final"}
    assert names >= {"checkpoint-1", "checkpoint-2"}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: oct(mode) for path, mode in modes.items() if mode != 0o666 & ~umask} == {}


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "rejected.jsonl", "checkpoint-1", ".unfinished"])
def test_a_symbolic_link_in_a_run_is_refused(
    name: str, tiny: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(run / "recipe.yaml", output)
    (tmp_path / "mine").write_text("my words\n")
    (output / name).symlink_to(tmp_path / "mine")
    said = refused(["sft", *recipe(tiny, output), "--smoke", "lora={targets: [attention], r: 2}"], capsys)
    assert f"{output / name} is a symbolic link" in said
    assert (tmp_path / "mine").read_text() == "my words\n"


# --- bombs ---------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        (BOMB, "at most 100,000"),
        ("a: &a {b: *a}", "in themselves"),
        ("a: &a [*a]", "in themselves"),
        ("[" * 3000, "too deep"),
        (f"seed: {'9' * 5000}", "4300 digits"),
        ("stage: sft\nx: " + "y" * (1 << 20), "1,048,576 bytes"),
        ("a: &a {k: 1}\nb: &b {<<: [*a, *a]}\n" + "".join(f"c{i}: &c{i} {{<<: [*{p}, *{p}]}}\n" for i, p in
            enumerate(["b", *(f"c{i}" for i in range(30))])), "at most 100,000"),
    ],
)  # fmt: skip
def test_a_recipe_has_bounds(text: str, bound: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    assert bound in refused(["check", str(tmp_path / "bomb.yaml")], capsys)


@pytest.mark.parametrize(
    ("value", "bound"),
    [
        ("&a {b: *a}", "in themselves"),
        ("[" * 3000, "too deep"),
        ("9" * 5000, "4300 digits"),
        ("{" + BOMB[:-1].replace("\n", ", ") + "}", "at most 100,000"),
    ],
)
def test_an_override_has_bounds(value: str, bound: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bound in refused(["check", str(SFT), f"data={value}"], capsys)


def test_a_recipe_that_never_ends_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "1,048,576 bytes" in refused(["check", "/dev/zero"], capsys)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.jsonl.gz", '{"prompt": "a", "completion": "b"}\n', "\n"),
        ("a.json.gz", '[{"prompt": "a", "completion": "b"},\n{"prompt": "', '"}]\n'),
        ("a.csv.gz", "prompt,completion\na,b\n", "\na,c\n"),
        ("a.csv", 'prompt,completion\na,b\na,"\n', '"\na,c\n'),
        ("a.tsv.gz", "", "\n"),
    ],
)
def test_a_row_has_a_bound(
    name: str, before: str, after: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file: Any = gzip.open if name.endswith(".gz") else open
    with file(tmp_path / name, "wt") as out:
        out.write(before + "a" * (3 * data_file.LONGEST_ROW) + after)
    capsys.readouterr()
    assert main(["check", *recipe(tiny, tmp_path / "o"), f"data=[{{path: {tmp_path / name}}}]"]) == 2
    assert "longer than 16,777,216" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting", ["num_hidden_layers", "n_routed_experts", "vocab_size", "num_labels", "hidden_size"]
)
def test_a_config_has_bounds(setting: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", **{setting: 10**9})
    assert f"{setting} is 1000000000: it must be at most" in refused(
        ["chat", str(tmp_path / "m"), "--prompt", "a"], capsys
    )
    if setting != "num_labels":
        said = refused(["check", *recipe(tiny, tmp_path / "o"), f"model.config.{setting}=1000000000"], capsys)
        assert f"{setting} is 1000000000: it must be at most" in said


HARMFUL = [
    "(.*)+x",
    "(a|a)*x",
    "(?:.*){30}x",
    ".*.*.*.*.*x",
    ".?" * 40 + "x",
    "(.|.)" * 40 + "x",
    "[",
]


@pytest.mark.parametrize("pattern", HARMFUL)
def test_patterns_of_an_adapter_have_bounds(
    pattern: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for field, value in (
        ("rank_pattern", {pattern: 4}), ("alpha_pattern", {pattern: 4}), ("target_modules", pattern),
        ("exclude_modules", pattern), ("layers_pattern", [pattern]), ("modules_to_save", [pattern]),
    ):  # fmt: skip
        shutil.copytree(run / "final", tmp_path / field)
        edit_json(tmp_path / field / "adapter_config.json", **{field: value})
        assert field in refused(["merge", str(tmp_path / field), str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "mlp.experts.gate_up_proj",
        r".*\.layers\.(0|[1-9]\d*)\.(self_attn|mlp)\.(q|kv_a|o)_proj",
        r"^(?!.*visual).*q_proj$",
        ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"a\*\)*",
        f"layers\\.({'|'.join(map(str, range(60)))})\\..*_proj",
    ],
)
def test_patterns_in_use_are_within_the_bounds(pattern: str) -> None:
    assert pattern_fault(pattern) is None


# --- the hub -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    [
        "base",
        "./base",
        "../base",
        "~/models/base",
        "a/b/c",
        "/gone/base",
        "here/base",
        "x/final",
        "x/checkpoint-500",
        "x/",
        "C:\\models\\base",
        "a/b--c",
        "a/b c",
        "",
        7,
    ],
)
def test_a_missing_base_is_never_asked_of_the_hub(
    base: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", ask)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", ask)
    monkeypatch.setattr("httpx2.Client.send" if "httpx2" in sys.modules else "httpx.Client.send", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    shutil.copytree(run / "final", tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=base)
    for arguments in (
        ["chat", "adapter", "--prompt", "a"], ["merge", "adapter", "out"], ["export", "adapter", "out"],
        ["check", *recipe(tmp_path / "adapter", tmp_path / "o")],
    ):  # fmt: skip
        assert "base" in refused(arguments, capsys)
    assert "base" in refused(["import", "adapter", "out"], capsys)


@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-V2-Lite", "a/b", "o_o/x.y-z"])
def test_names_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name)
    (tmp_path / name.split("/")[0]).mkdir()
    assert not is_hub_name(name)
