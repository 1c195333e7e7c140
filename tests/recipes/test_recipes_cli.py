"""The command line: exit codes, messages, and what it does not import."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conversations.errors import ToolkitError
from recipes import cli
from recipes.cli import commands, main

ROOT = Path(__file__).parents[2]
SFT = ROOT / "recipes" / "v2_lite" / "sft_lora.yaml"


def dsv2(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The real command line, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "recipes.cli", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_an_unknown_key_ends_with_2_and_one_unwrapped_line() -> None:
    done = dsv2("sft", str(SFT), "model.pth=try/m")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: unknown key "model.pth", did you mean "model.path"?\n'


def test_help_and_the_schema_need_no_torch_and_no_time() -> None:
    script = (
        "import sys, time; began = time.process_time()\n"
        "from recipes.cli import main\n"
        "import recipes, conversations, sft.config, reward.config, rl.config, eval.config\n"
        "assert main(['--help']) == 0\n"
        f"assert main(['sft', {str(SFT)!r}, 'model.pth=x']) == 2\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print('seconds', time.process_time() - began)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("seconds")[1]) < 0.5
    for name in commands():
        assert f"dsv2 {name} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stf", "x.yaml"], 'unknown command "stf"; did you mean "sft"?'),
        (["teach", "a", "b"], 'unknown command "teach"; commands: init, check'),
        (["sft"], "the following arguments are required: RECIPE"),
        (["sft", "missing.yaml"], "no such recipe: missing.yaml"),
        (["sft", str(SFT), "--smok"], "unrecognized arguments: --smok; see: dsv2 sft --help"),
        (["reward", str(SFT)], f"is a recipe of stage sft, not reward; run: dsv2 sft {SFT}"),
        (["run", str(SFT)], f"is a recipe of stage sft, not chain; run: dsv2 sft {SFT}"),
        (["init", "x"], "the following arguments are required: --preset"),
        (["init", "x", "--preset", "tiny", "--seed", "x"], "argument --seed: 'x' is not a whole number"),
    ],
)
def test_wrong_commands_end_with_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.out == ""
    assert "Traceback" not in captured.err and list(tmp_path.iterdir()) == []


def test_options_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    command = cli.Command("", "", cli.recipe_arguments, lambda a: seen.append(a) or 0)
    monkeypatch.setattr(cli, "commands", lambda: {"sft": command})
    for words in (
        ["r.yaml", "--smoke", "a=1", "b=2"],
        ["--smoke", "r.yaml", "a=1", "b=2"],
        ["r.yaml", "a=1", "b=2", "--smoke"],
    ):
        assert main(["sft", *words]) == 0
    assert {(str(a.recipe), tuple(a.overrides), a.smoke) for a in seen} == {("r.yaml", ("a=1", "b=2"), True)}


@pytest.mark.parametrize(
    ("command", "raised", "code", "said"),
    [
        ("sft", ToolkitError("data: nothing"), 2, "error: data: nothing\n"),
        ("sft", KeyboardInterrupt(), 130, "interrupted; the same command resumes from there\n"),
        ("run", KeyboardInterrupt("at step 3"), 130, "interrupted: at step 3; the same command resumes from there\n"),
        ("merge", KeyboardInterrupt(), 130, "interrupted; nothing was finished\n"),
        ("eval", KeyboardInterrupt(), 130, "interrupted; nothing was finished\n"),
    ],
)
def test_exit_codes(
    command: str,
    raised: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(argv: object) -> int:
        raise raised

    monkeypatch.setattr(cli, "dispatch", fail)
    assert main([command]) == code
    assert capsys.readouterr().err == said


def test_the_models_errors_are_the_users_and_faults_are_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek_v2_modeling.errors import ModelError

    def fail(argv: object) -> int:
        raise kind("x")

    monkeypatch.setattr(cli, "dispatch", fail)
    kind: type[Exception] = ModelError
    assert main([]) == 2
    kind = ValueError
    assert main([]) == 1
    shown = capsys.readouterr().err
    assert shown.endswith("ValueError: x\n") and "Traceback (most recent call last)" in shown


def test_an_error_says_which_process_it_is_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["stf"]) == 2
    assert capsys.readouterr().err.startswith('rank 1: error: unknown command "stf"')


def test_sigterm_ends_like_ctrl_c(tmp_path: Path) -> None:
    script = (
        "import time, recipes.cli as c\n"
        "c.dispatch = lambda argv: print('on', flush=True) or time.sleep(60)\n"
        "exit(c.main([]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.startswith("interrupted")


INTERRUPTED = """
import atexit, os, signal, sys
import dsv2_start

class Interrupting:
    def find_spec(name, *rest):
        if name == "recipes.launch":
            os.kill(os.getpid(), signal.SIGINT)

if sys.argv[1] == "at the beginning":
    sys.meta_path.insert(0, Interrupting)
else:
    atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
sys.argv[1:] = ["--version"]
sys.exit(dsv2_start.main())
"""


@pytest.mark.parametrize(
    ("when", "code", "said"),
    [("at the beginning", 130, "interrupted; nothing was finished\n"), ("at the end", -signal.SIGTERM, "")],
)
def test_a_signal_before_and_after_the_command_is_no_traceback(when: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, when], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)
