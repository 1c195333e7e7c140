"""What a rehearsal leaves as it was."""

import gc
import os
import signal
import threading
from pathlib import Path

import pytest

from recipes.cli import main
from recipes.runs.rehearsal import _OneStep, _unnoticed


@pytest.mark.parametrize("frozen", [True, False])
def test_garbage_collection_is_as_before(frozen: bool):
    gc.unfreeze()
    try:
        if frozen:
            gc.freeze()
        with _unnoticed():
            assert gc.get_freeze_count()
        assert bool(gc.get_freeze_count()) == frozen
    finally:
        gc.freeze()  # as conftest.py leaves it


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
@pytest.mark.parametrize("event", ["on_log", "on_train_end"])
def test_a_signal_after_its_step_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str):
    def stop(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_OneStep, event, stop)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert main(["check", "tiny/sft", "--smoke", "output_dir=run"]) == 130
    finally:
        for number, handler in before:
            signal.signal(number, handler)
