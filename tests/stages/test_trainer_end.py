"""How a run of RunTrainerMixin ends: by a request, a signal, a limit or NaN; on transformers' own Trainer."""

import json
import os
import signal
import threading

import pytest
import torch

from deepseek_v2_modeling import ModelError
from deepseek_v2_modeling.training.mixin import RunLimits, StopRequested

from ..helpers.plain_trainer import PlainTrainer, Spoiled, Stopping, make, metrics, steps
from ..helpers.stages import assert_same_weights, chat_model, weights


def test_stop_request_finishes_the_step_and_can_be_gone_on_with(tmp_path):
    with pytest.raises(StopRequested, match="step 3"):
        Stopping.stop_at = 3
        make(tmp_path / "b", Stopping).train()
    assert (tmp_path / "b" / "checkpoint-3").is_dir()
    assert "train_runtime" not in metrics(tmp_path / "b")[-1]
    straight, resumed = make(tmp_path / "a"), make(tmp_path / "b", model=chat_model(seed=1))
    straight.train()
    resumed.train(tmp_path / "b" / "checkpoint-3")
    assert_same_weights(straight.model, resumed.model)
    assert steps(tmp_path / "b") == [1, 2, 3, 4]


@pytest.mark.parametrize(("last", "settings"), [(4, {}), (1, {"limits": RunLimits(max_seconds=1e-6), "max_steps": 50})])
def test_after_a_stop_in_the_last_step_there_is_nothing_left_to_train(tmp_path, last, settings):
    """Whatever makes it the last one."""
    Stopping.stop_at = last
    with pytest.raises(StopRequested, match=f"step {last}"):
        make(tmp_path, Stopping, **settings).train()
    resumed = make(tmp_path, model=chat_model(seed=1), **settings)
    assert resumed.train(tmp_path / f"checkpoint-{last}").global_step == last
    assert steps(tmp_path)[-1] == last and "train_runtime" in metrics(tmp_path)[-1]


class StoppingLate(PlainTrainer):
    """Asks for a stop after the last step has looked for one."""

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.state.global_step == self.state.max_steps:
            self.request_stop()


BEST = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_strategy": "best"}


@pytest.mark.parametrize("settings", [{"save_strategy": "no"}, {"save_steps": 2}, BEST])
def test_a_stop_after_the_last_step_is_not_lost(tmp_path, settings):
    """Also where the last step has no checkpoint; and what it makes is the model of a run without a stop."""
    straight = make(tmp_path / "a", **settings)
    straight.train()
    with pytest.raises(StopRequested, match="step 4"):
        make(tmp_path / "b", StoppingLate, **settings).train()
    assert (tmp_path / "b" / "checkpoint-4").is_dir()
    resumed = make(tmp_path / "b", model=chat_model(seed=1), **settings)
    resumed.train(tmp_path / "b" / "checkpoint-4")
    assert_same_weights(straight.model, resumed.model)
    assert [line.keys() for line in metrics(tmp_path / "a")] == [line.keys() for line in metrics(tmp_path / "b")]


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
def test_signals_after_the_end_of_training_have_their_usual_effect(tmp_path):
    class Signalled(PlainTrainer):
        def log(self, logs, *args, **kwargs):
            super().log(logs, *args, **kwargs)
            if "train_runtime" in logs:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Signalled, save_strategy="no").train()


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_signals_ask_for_a_stop(tmp_path, which):
    class Signalled(PlainTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 1:
                os.kill(os.getpid(), which)
            return super().training_step(*args, **kwargs)

    before = signal.getsignal(which)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Signalled).train()
    assert (tmp_path / "checkpoint-2").is_dir()
    assert signal.getsignal(which) is before


def test_time_limit_ends_training_as_if_it_were_done(tmp_path):
    trainer = make(tmp_path, limits=RunLimits(max_seconds=1e-6), max_steps=50)
    assert trainer.train().global_step == 1
    rate = metrics(tmp_path)[0]["learning_rate"]
    assert rate == pytest.approx(1e-3)  # the schedule is that of 50 steps


def test_seconds_are_those_of_training_alone(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    assert trainer.seconds == 0
    trainer.train()
    after_training = trainer.seconds
    trainer.evaluate()
    assert trainer.seconds == after_training > 0


def test_time_limit_counts_the_time_before_a_resume(tmp_path):
    make(tmp_path, max_steps=4).train()
    state = tmp_path / "checkpoint-2" / "run_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "seconds": 1000.0}))
    resumed = make(tmp_path, max_steps=4, limits=RunLimits(max_seconds=900))
    assert resumed.train(tmp_path / "checkpoint-2").global_step == 3
    assert resumed.seconds > 1000


def test_nan_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(ModelError, match=r"loss is nan at step 2.*on_nan: skip"):
        make(tmp_path, Spoiled).train()
    assert steps(tmp_path) == [1]


def test_nan_gradient_stops_the_run(tmp_path):
    class BadGradient(PlainTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1:
                next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
            return loss

    with pytest.raises(ModelError, match=r"gradient's norm is inf at step 2.*checkpoint yet"):
        make(tmp_path, BadGradient).train()


def test_nan_can_be_skipped(tmp_path):
    trainer = make(tmp_path, Spoiled, limits=RunLimits(on_nan="skip"), max_steps=2)
    kept = {}
    trainer.add_callback(_Keep(trainer, kept))
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(torch.equal(kept[1][name], value) for name, value in weights(trainer.model).items())
    assert metrics(tmp_path)[1]["skipped_updates"] == 1


def _Keep(trainer, kept):
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept[state.global_step] = weights(trainer.model)

    return Keep()
