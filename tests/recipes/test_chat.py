"""`dsv2 chat`: several turns on one cache, commands, cut answers, two models, and a real terminal."""

import argparse
import errno
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations.errors import ToolkitError
from conversations.rendering.conversation import prompt_ids
from recipes.chat import partner, session
from recipes.chat.partner import Partner, _Streamer
from recipes.cli import main
from recipes.runs.new_model import make_model
from recipes.runs.preset_tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    make_model(folder, "tiny", 0)
    return folder


def new_partner(path: Path, **changes: Any) -> Partner:
    given = {"dtype": "float32", "seed": 0, "system": None, "temperature": 0.0, "max_new_tokens": 8, **changes}
    return Partner(str(path), argparse.Namespace(**given))


def silent(piece: str) -> None: ...


def read_tokens(talk: Partner, ask: Callable[[], object]) -> int:
    """How many tokens the first forward of a call reads."""
    lengths: list[int] = []
    hook = talk.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ask()
    hook.remove()
    return lengths[0]


def test_a_turn_reads_only_what_is_new_and_answers_as_if_it_had_read_all(base: Path) -> None:
    talk, earlier = new_partner(base), []
    for text in ("How much is 22 + 31?", "And 5 + 40?", "你好，17加25等于几？"):
        prompt = prompt_ids([*talk.messages, {"role": "user", "content": text}], talk.tokenizer)
        assert prompt[: len(earlier)] == earlier  # what a random model says is not encoded as it was generated
        fresh = new_partner(base)
        fresh.messages = list(talk.messages)
        expected = fresh.answer(text, silent)
        read = read_tokens(talk, lambda text=text: talk.answer(text, silent))
        assert read <= len(prompt) - len(earlier)
        assert talk.messages == fresh.messages and talk.messages[-1]["content"] == expected.text
        earlier = prompt


def test_an_answer_that_is_encoded_as_it_was_generated_is_not_read_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = new_partner(base)
    answer = talk.tokenizer(" 53.", add_special_tokens=False)["input_ids"]
    script = iter([*answer, talk.tokenizer.eos_token_id])

    def follow(model: Any, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1.0).index_fill_(1, torch.tensor([next(script, 5)]), 1.0)

    monkeypatch.setattr(partner, "_only_numbers", follow)
    assert talk.answer("How much is 22 + 31?", silent).text == "53."
    cached = len(talk._cached)
    prompt = prompt_ids([*talk.messages, {"role": "user", "content": "And 5 + 40?"}], talk.tokenizer)
    assert read_tokens(talk, lambda: talk.answer("And 5 + 40?", silent)) == len(prompt) - cached


def test_changed_conversations_do_not_use_what_is_no_longer_in_them(base: Path) -> None:
    changes: list[Callable[[Partner], object]] = [
        Partner.undo,
        Partner.reset,
        lambda talk: talk.set_system("Be brief."),
    ]
    for change in changes:
        talk, fresh = new_partner(base), new_partner(base)
        talk.answer("How much is 22 + 31?", silent)
        talk.answer("What is 5 + 40?", silent)
        change(talk)
        fresh.messages = list(talk.messages)
        assert talk.answer("And now?", silent).text == fresh.answer("And now?", silent).text


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, fresh = new_partner(base), new_partner(base)
    talk.answer("How much is 22 + 31?", silent)
    before = list(talk.messages)

    def out_of_memory(piece: str) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        talk.answer("What is 5 + 40?", out_of_memory)
    assert talk.messages == before
    fresh.messages = before
    assert talk.answer("And now?", silent).text == fresh.answer("And now?", silent).text


def test_where_an_answer_ended_is_known(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = new_partner(base)
    cut = talk.answer("How much is 22 + 31?", silent)
    assert cut.ending == "length" and cut.tokens == 8 and "cut after 8 tokens" in cut.mark
    stopped = talk.answer("What is 5 + 40?", silent, lambda: True)
    assert stopped.ending == "stopped" and stopped.tokens == 1
    talk.limit = stopped.used + 20
    full = talk.answer("1?", silent)
    talk.max_new_tokens = 99
    talk.undo()
    full = talk.answer("1?", silent)
    assert full.ending == "context" and full.used == talk.limit and "context" in full.mark
    before = list(talk.messages)
    with pytest.raises(ToolkitError, match="max_position_embeddings"):
        talk.answer("1?", silent)
    assert talk.messages == before
    talk.reset()
    monkeypatch.setattr(partner, "end_tokens", lambda model, tokenizer: list(range(model.config.vocab_size)))
    ended = talk.answer("1?", silent)
    assert ended.ending == "end" and not ended.mark and ended.tokens == 1


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    shown: list[str] = []
    streamer = _Streamer(tokenizer, shown.append)
    for tokens in ([1, 2, 3], *([token] for token in ids)):  # the prompt comes first
        streamer.put(torch.tensor([tokens]))
    streamer.end()
    return shown


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])).filter(lambda text: "\ufffd" not in text))
def test_pieces_of_an_answer_are_whole_characters(text: str) -> None:
    tokenizer = build_tokenizer("tiny")
    shown = pieces(tokenizer, tokenizer(" " + text, add_special_tokens=False)["input_ids"])
    assert "".join(shown) == (" " + text).lstrip() and not any("\ufffd" in piece for piece in shown)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 1500), st.integers(0, 300))))
def test_pieces_of_any_tokens_are_their_text(ids: list[int]) -> None:
    tokenizer = build_tokenizer("tiny")
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True).lstrip()


def test_commands_over_a_pipe(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    turns = (
        "What is 1 + 1?\n/undo\n/undo\n/system Be brief.\n/temperature 0.5\nWhat is 2 + 2?\n/save talk.jsonl\n/reset\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns + "/help\n/exit\nnever asked\n"))
    assert main(["chat", str(base), "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    for line in (
        "[nothing to undo]",
        "[system message set]",
        "[temperature 0.5]",
        "[1 conversation added to talk.jsonl]",
    ):
        assert line in err
    assert err.count("[cut after 4 tokens; raise --max-new-tokens for more]") == 2 and "/save" in err
    assert "of context used" not in err
    (row,) = map(json.loads, Path("talk.jsonl").read_text(encoding="utf-8").splitlines())
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    recipe = {"stage": "sft", "model": {"path": str(base)}, "data": [{"path": "talk.jsonl"}], "output_dir": "run"}
    Path("again.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert main(["check", "again.yaml"]) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/save talk", "ends in .jsonl"),
        ("Hello\n/save no/such\0place.jsonl", "/save no/such"),
        ("/save talk.jsonl", "nothing to save"),
        ("/temperature hot", "/temperature hot: give a number of 0 or more"),
        ("/temperature -1", "/temperature -1: give a number of 0 or more"),
        ("/temperature\thot", "/temperature hot: give a number of 0 or more"),
        ("/undo 3", "/undo 3: /undo stands alone"),
        ("/reset\tthe router", "/reset the router: /reset stands alone"),
        ("x" * 60_000, "max_position_embeddings"),
    ],
)
def test_a_wrong_turn_over_a_pipe_ends_with_one_line(
    base: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(line + "\n"))
    assert main(["chat", str(base), "--max-new-tokens", "2"]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


LONG = "7" * 420  # as many tokens; the model has 512 positions
NEARLY_FULL = r"4\d\d of 512 tokens of context used; /reset and /undo free it"


def test_a_context_that_is_nearly_full_is_said(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(base), "--prompt", LONG, "--max-new-tokens", "4"]) == 0
    assert re.search(rf"^\[{NEARLY_FULL}\]$", capsys.readouterr().err, re.MULTILINE)


def test_two_models_side_by_side(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    make_model(other, "tiny", 1)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"What is 1 + 1?\n/undo\n{LONG}\n"))
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["chat", "--compare", str(base), str(other), "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("4 tokens, ") == 4 and "\x1b" not in out and len(re.findall(NEARLY_FULL, out)) == 2
    for words in (["chat", str(base), "--compare", str(base), str(other)], ["chat", "--prompt", "a"]):
        assert main(words) == 2
        assert "give one MODEL_OR_RUN, or two with --compare" in capsys.readouterr().err


def test_a_turn_that_one_of_two_models_cannot_take_is_in_neither_conversation(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, narrow = new_partner(base), new_partner(base)
    narrow.limit = 40
    with pytest.raises(ToolkitError, match="at most 40"):
        session.answer([wide, narrow], "1 + " * 30)
    assert wide.messages == narrow.messages == []


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_temperature_that_is_none_is_refused(base: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(base), "--prompt", "1?", f"--temperature={value}"]) == 2
    assert f"--temperature is {float(value)}; it must be a number of 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**32), "1.5", "٣"])
def test_a_seed_that_is_none_is_refused(
    base: Path, tmp_path: Path, seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["chat", str(base), "--prompt", "1?"], ["init", str(tmp_path / "new"), "--preset", "tiny"]):
        assert main([*words, f"--seed={seed}"]) == 2
        assert f"{seed!r} is not a whole number from 0 to 4,294,967,295" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


PROMPT = r"\x1b\[0m> ?\x08"  # as the editor draws it


class Terminal:
    """`dsv2 chat` in a pseudo-terminal."""

    def __init__(self, *words: str):
        self.terminal, side = pty.openpty()
        env = {
            **os.environ,
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONIOENCODING": "utf-8",
        }
        command = [sys.executable, "-m", "recipes.cli", "chat", *words]
        self.process = subprocess.Popen(
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            env=env,
            start_new_session=True,
            preexec_fn=_take_terminal,
            cwd=Path(__file__).parents[2],
        )
        os.close(side)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait(self, pattern: str, seconds: float = 90) -> str:
        """What the terminal shows up to `pattern`; it is taken from what later calls see."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text, re.DOTALL)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            if not select.select([self.terminal], [], [], 1)[0]:
                continue
            try:
                self.text += os.read(self.terminal, 65536).decode(errors="replace")
            except OSError as error:  # the other side is closed
                assert error.errno == errno.EIO and re.search(pattern, self.text, re.DOTALL), self.text
        shown, self.text = self.text[: match.end()], self.text[match.end() :]
        return shown


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(base: Path, tmp_path: Path) -> Iterator[Terminal]:
    model = tmp_path / "long"
    shutil.copytree(base, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    screen = Terminal(str(model), "--max-new-tokens", "9000")
    yield screen
    screen.process.kill()
    screen.process.wait()
    os.close(screen.terminal)


def test_in_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    terminal.wait(f"/help lists the commands.*{PROMPT}")
    long_line = "x" * 5000
    terminal.type(f"\x1b[200~first line\n{long_line}\nthird 汉字\x1b[201~")
    terminal.type("\x7f\x7f好\r")  # both characters erased, another one typed
    terminal.wait(r"\?2004l[^\x1b]{3}")  # the answer, of up to 9,000 tokens, has begun
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.wait(rf"\[stopped\].*{PROMPT}")
    terminal.type("abc\x03")  # at the prompt, Ctrl-C clears the line
    terminal.type("/nothing\r")
    terminal.wait(f"no command /nothing.*{PROMPT}")
    terminal.type(f"/save {saved}\r")
    terminal.wait(f"1 conversation added.*{PROMPT}")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=60) == 0
    (row,) = map(json.loads, saved.read_text(encoding="utf-8").splitlines())
    question, answer = row["messages"]
    assert question == {"role": "user", "content": f"first line\n{long_line}\nthird 好"}
    assert answer["role"] == "assistant"
