"""Trainer callbacks of `RunTrainerMixin`: a line of metrics per log, a progress bar, and stopping at a limit.

They need transformers only.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .run_files import METRICS_FILE, append_lines

SHOWN = ("loss", "reward", "eval_loss", "accuracy", "eval_accuracy", "grad_norm", "learning_rate")
LINES_WITHOUT_TERMINAL = 20
LINES_WITH_SHARES = 50


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl, in the main process only.

    shares: returns the expert shares of the last log; these long lists are only added to some fifty lines of a run.
    keep_summary: returns whether to write the line at the end of training; not if the run will be resumed.
    """

    def __init__(self, shares: Callable[[], dict[str, Any]], keep_summary: Callable[[], bool]):
        self.shares = shares
        self.keep_summary = keep_summary

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or ("train_runtime" in logs and not self.keep_summary()):
            return
        line = {"step": state.global_step, **logs}
        if state.global_step % max(1, state.max_steps // LINES_WITH_SHARES) == 0:
            line |= self.shares()
        assert args.output_dir is not None
        append_lines(Path(args.output_dir) / METRICS_FILE, [line])


class Progress(TrainerCallback):
    """A progress bar on a terminal, otherwise about twenty short lines; on stderr, in the main process only."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.began = 0.0
        self.spoken = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = time.monotonic()
        self.spoken = state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            # sys.stderr may be wrapped in a stream that does not pass on the cursor movements of a bar.
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, file=sys.__stderr__
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        shown = {key: f"{logs[key]:.4g}" for key in SHOWN if isinstance(logs.get(key), float | int)}
        if self.bar is not None:
            self.bar.set_postfix(shown)
            return
        due = state.global_step - self.spoken >= max(1, state.max_steps // LINES_WITHOUT_TERMINAL)
        if not state.is_world_process_zero or not shown or not (due or state.global_step == state.max_steps):
            return
        self.spoken = state.global_step
        values = "  ".join(f"{key} {value}" for key, value in shown.items())
        seconds = time.monotonic() - self.began
        print(f"step {state.global_step}/{state.max_steps}  {values}  {seconds:.0f} s", file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StepControl(TrainerCallback):
    """Ends the run after a step if requested, and makes sure that runs resume exactly from checkpoints.

    Every checkpoint is preceded by a log, so that no average over steps spans a checkpoint. After the last step of an
    epoch or of the run the Trainer may still evaluate; the checkpoint is then written after the evaluation.

    ask: returns (stop now and write a checkpoint, a limit is reached), the same on every process.
    """

    def __init__(self, ask: Callable[[], tuple[bool, bool]]):
        self.ask = ask
        self.save_is_due = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        stop, limit_reached = self.ask()
        control.should_save = control.should_save or stop
        control.should_training_stop = control.should_training_stop or stop or limit_reached
        control.should_log = (
            control.should_log or control.should_save or control.should_training_stop or control.should_evaluate
        )
        if control.should_training_stop or state.epoch == round(state.epoch or 0.0):
            self.save_is_due, control.should_save = control.should_save, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.save_is_due = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save = control.should_save or self.save_is_due
        control.should_log = control.should_log or control.should_save or control.should_training_stop
