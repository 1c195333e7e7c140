"""One process at a time writes to a place; full and read-only disks; what killed processes leave behind."""

import errno
import json
import os
import platform
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

import eval.stage
import recipes.runs.manifest
from conversations.errors import ToolkitError
from conversations.scratch import PREFIX, scratch_directory
from deepseek_v2_modeling import DeepseekV2ForCausalLM
from deepseek_v2_modeling.training.finite import FiniteMixin
from recipes.cli import main
from recipes.files import read_json, write_json
from recipes.lock import ROOM, hold_directory, hold_path, owner_of
from recipes.runs.new_model import make_model

EVAL = """\
stage: eval
model: {path: base}
data: [{path: "tiny:sft_heldout?n=2"}]
tasks: [{name: loss, metric: loss}]
output_dir: run
"""
CHAIN = "stage: chain\nmodel: {path: base}\noutput_dir: run\nstages: [{name: e, recipe: e.yaml, results: stages.e}]\n"
SFT = "stage: sft\nmodel: {path: base}\ndata: [{path: 'tiny:sft_train?n=2'}]\noutput_dir: run\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    make_model(folder, "tiny", 0)
    return folder


@pytest.fixture(autouse=True)
def home(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    for name, text in (("e", EVAL), ("chain", CHAIN), ("sft", SFT)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.parts[0] not in ("runs", "base"))


def in_a_child(work: Callable[[], Any]) -> int:
    """A process that does some work and is killed after it; returns its id when it has gone."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    return pid


COMMANDS = {
    "eval": (hold_directory, "run", ["eval", "e.yaml"]),
    "sft": (hold_directory, "run", ["sft", "sft.yaml"]),
    "chain": (hold_directory, "run", ["run", "chain.yaml"]),
    "stage of a chain": (hold_directory, "run/e", ["run", "chain.yaml"]),
    "init": (hold_path, "new", ["init", "new", "--preset", "tiny"]),
    "merge": (hold_path, "out", ["merge", "base", "out"]),
    "export": (hold_path, "out", ["export", "base", "out", "--layout", "per_expert"]),
    "import": (hold_path, "out", ["import", "base", "out"]),
    "experts": (hold_path, "x.json", ["experts", "sft.yaml", "--output", "x.json"]),
    "check": (hold_path, "run.check.html", ["check", "e.yaml"]),
    "report": (hold_path, "page.html", ["report", "there", "--output", "page.html"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_of_two_processes_is_told_who_is_first(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    hold, place, words = COMMANDS[name]
    write_json(Path("there/manifest.json"), {})
    with hold(Path(place)):
        before = files()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{place} is in use by process {os.getpid()} on " in error
        assert [file for file in files() if not file.startswith(("run/manifest", "run/recipe", "run/chain"))] == before
    assert not [file for file in files() if file.endswith(".lock")]


def test_a_killed_owner_is_followed_and_its_half_files_go(capsys: pytest.CaptureFixture[str]) -> None:
    held: list[Any] = []  # or the lock would be given up when the function ends

    def work() -> None:
        held.append(hold_directory(Path("run")))
        held[0].__enter__()
        Path("run/.manifest.json.abc.tmp").write_text("{")

    in_a_child(work)
    assert Path("run/.lock").stat().st_size == ROOM and owner_of(Path("run")) is None
    assert main(["eval", "e.yaml"]) == 0
    assert not list(Path("run").glob(".*")) and read_json(Path("run/manifest.json"))["status"] == "finished"


def test_a_lock_of_another_host_is_never_taken(capsys: pytest.CaptureFixture[str]) -> None:
    said = {"host": "elsewhere", "pid": 7, "command": "dsv2 eval e.yaml", "since": "2026-01-01T00:00:00+00:00"}
    write_json(Path("run/.lock"), said)
    assert main(["eval", "e.yaml"]) == 2
    error = capsys.readouterr().err
    assert "run is in use by process 7 on elsewhere" in error and "if it has ended, remove run/.lock" in error
    owner = owner_of(Path("run"))
    assert owner is not None and owner.pid == 7
    Path("run/.lock").unlink()
    assert main(["eval", "e.yaml"]) == 0


OWNERS = st.fixed_dictionaries(
    {},
    optional={
        "host": st.one_of(st.just(platform.node()), st.text(), st.none(), st.integers(), st.lists(st.text())),
        "pid": st.one_of(
            st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.sampled_from([0, -1, 1, 2**31, 10**300])
        ),
        "command": st.one_of(st.text(), st.integers(), st.dictionaries(st.text(), st.text())),
        "since": st.one_of(st.text(), st.floats()),
    },
)
CONTENTS = st.one_of(
    OWNERS.map(lambda owner: json.dumps(owner).encode()),
    st.binary(),
    st.sampled_from([b"", b"null", b"[]", b"7", b'"x"', b"[" * 60_000, b"1e999", b"{" * 999, b"9" * 5_000]),
)


@pytest.mark.parametrize("locks", ["flock", "none"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENTS)
def test_whatever_a_lock_says_it_is_taken_or_named(locks: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system has no locks, and the process that the file names is looked for."""
    if locks == "none":
        monkeypatch.setattr("recipes.lock.fcntl.flock", no_locks)
    monkeypatch.setattr("recipes.lock._TRIES", 1)
    monkeypatch.setattr("recipes.lock._PAUSE", 0)
    Path("run").mkdir(exist_ok=True)
    for hold, target, lock in (
        (hold_directory, Path("run"), Path("run/.lock")),
        (hold_path, Path("page.html"), Path(".page.html.lock")),
    ):
        lock.write_bytes(content)
        said = owner_of(Path("run"))
        assert said is None or "\n" not in str(said)
        try:
            with hold(target):
                assert json.loads(lock.read_bytes())["pid"] == os.getpid()
        except ToolkitError as error:
            assert " is in use by " in str(error) and "\n" not in str(error) and len(str(error)) < 3_000
            assert lock.read_bytes() == content
        else:
            assert not lock.exists()


def no_locks(*args: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("content", [b"[" * 60_000, b'{"host": "%s", "pid": 1e999, "command": "", "since": ""}'])
def test_a_report_and_a_model_are_written_over_a_broken_lock(content: bytes, capsys: Any) -> None:
    content = content.replace(b"%s", platform.node().encode())
    Path("there").mkdir()
    Path("there/recipe.yaml").write_text("stage: sft\n")
    for lock in (".page.html.lock", "there/.lock", ".new.lock"):
        Path(lock).write_bytes(content)
    assert main(["report", "there", "--output", "page.html"]) == 0
    assert main(["init", "new", "--preset", "tiny"]) == 0
    assert Path("page.html").is_file() and Path("new/config.json").is_file()


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
def test_a_lock_that_is_no_plain_file_is_refused_and_left(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    lock, notes = Path(".new.lock"), Path("notes.txt")
    notes.write_text("mine")
    if kind in ("link", "dangling"):
        lock.symlink_to("notes.txt" if kind == "link" else "nowhere")
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    assert main(["init", "new", "--preset", "tiny"]) == 2
    said = capsys.readouterr().err
    assert ".new.lock is not a regular file" in said and said.count("\n") == 1
    assert notes.read_text() == "mine" and not Path("nowhere").exists() and not Path("new").exists()


def test_the_other_processes_of_a_launch_need_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_directory(Path("run")):
        monkeypatch.setenv("RANK", "1")
        with hold_directory(Path("run")):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ToolkitError, match="in use"), hold_directory(Path("run")):
            pass


# --- disks -------------------------------------------------------------------------------------------------------


def refusing(number: int) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("words", [["eval", "e.yaml"], ["run", "chain.yaml"], ["init", "new", "--preset", "tiny"]])
@pytest.mark.parametrize(("function", "number"), [("pwrite", errno.ENOSPC), ("open", errno.EROFS)])
def test_a_disk_that_takes_nothing_is_one_line(
    words: list[str], function: str, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files()
    with monkeypatch.context() as patch:
        patch.setattr(f"recipes.lock.os.{function}", refusing(number))
        code = main(words)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and os.strerror(number) in error
    assert files() == before


def test_a_full_disk_in_a_run_leaves_a_manifest_that_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even the manifest has room, but for what the lock file kept."""
    real, full = write_json, [False]

    def writes(path: Path, value: Any) -> None:
        if full[0] and Path("run/.lock").stat().st_size >= ROOM:
            refusing(errno.ENOSPC)()
        real(path, value)

    def appends(*args: Any) -> None:
        full[0] = True
        refusing(errno.ENOSPC)()

    monkeypatch.setattr(recipes.runs.manifest, "write_json", writes)
    monkeypatch.setattr(eval.stage, "append_lines", appends)
    assert main(["eval", "e.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and "No space left on device; free some space" in error
    assert read_json(Path("run/manifest.json"))["status"] == "failed"
    assert not list(Path("run").glob(".*"))


def test_a_model_that_the_disk_cannot_hold_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(self: Any, folder: str, **kwargs: Any) -> None:
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = files()
    monkeypatch.setattr(DeepseekV2ForCausalLM, "save_pretrained", half)
    assert main(["init", "new", "--preset", "tiny"]) == 2
    assert "new: the disk is full; nothing was left there" in capsys.readouterr().err and files() == before


def test_what_a_chain_begins_with_may_be_cut_off_by_a_kill(capsys: pytest.CaptureFixture[str]) -> None:
    """Between recipe.yaml and manifest.json."""
    assert main(["run", "chain.yaml"]) == 0
    figures = {k: v for k, v in read_json(Path("run/results.json")).items() if k not in ("seconds", "peak_memory_gb")}
    for name in ("manifest.json", "chain.json", "results.json"):
        Path("run", name).unlink()
    assert main(["run", "chain.yaml"]) == 0
    again = read_json(Path("run/results.json"))
    assert {key: again[key] for key in figures} == figures


# --- temporary files ---------------------------------------------------------------------------------------------


def test_temporary_files_of_killed_processes_go_at_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(Path("tmp").absolute()))
    Path("tmp", f"{PREFIX}of-somebody").mkdir()
    in_a_child(lambda: (scratch_directory() / "rows.arrow").write_text("rows"))
    assert len(list(Path("tmp").iterdir())) == 2
    live = in_a_child_that_waits()
    try:
        assert main(["--version"]) == 0
        left = [path.name for path in Path("tmp").iterdir()]
        assert len(left) == 2 and f"{PREFIX}of-somebody" in left  # no lock, and young: it may be an older version's
    finally:
        os.kill(live, signal.SIGKILL)
        os.waitpid(live, 0)
    assert main(["--version"]) == 0
    assert [path.name for path in Path("tmp").iterdir()] == [f"{PREFIX}of-somebody"]


def in_a_child_that_waits() -> int:
    """The id of a process that has a scratch directory and lives on."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        scratch_directory()
        os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    return pid


def stopped_in_rehearsal(which: signal.Signals, patch: pytest.MonkeyPatch) -> int:
    real = FiniteMixin.training_step

    def step(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), which)
        return real(*args, **kwargs)

    patch.setattr(FiniteMixin, "training_step", step)
    return main(["sft", "sft.yaml"])


def test_a_signal_while_training_is_tried_out_tells_of_no_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a kill leaves of it goes at the next start."""
    Path("tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(Path("tmp").absolute()))
    assert stopped_in_rehearsal(signal.SIGTERM, monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted; the same command resumes from there\n" and not Path("run").exists()
    assert not list(Path("tmp").iterdir())
    in_a_child(lambda: stopped_in_rehearsal(signal.SIGKILL, monkeypatch))
    assert [path.name[:5] for path in Path("tmp").iterdir()] == [PREFIX]
    assert main(["--version"]) == 0 and not list(Path("tmp").iterdir())


def test_a_command_takes_its_temporary_files_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(Path("tmp").absolute()))
    recipe = json.dumps({"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 64})
    assert main(["sft", "sft.yaml", f"training={recipe}", "format.too_long=drop"]) == 0
    assert not list(Path("tmp").iterdir())
