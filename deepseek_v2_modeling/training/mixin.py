"""A mixin for transformers and TRL trainers that adds what training a DeepSeek-V2 model needs.

It adds balance losses to the loss, expert load to the log, float32 trainable weights under bf16 computation, atomic
checkpoints, exact resume, interruption without lost work, and limits on time and tokens. It needs transformers only.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback
from transformers.trainer_utils import TrainOutput

from ..adapters.lora import train_in_float32
from ..family import check_bias_updates
from ..layers.balance_losses import COEFFICIENTS, collect_balance
from ..sharding import at, is_sharded, reshard, wait_at_most
from .arguments import RunLimits, check_batches, training_arguments
from .balance_log import BalanceLog
from .callbacks import MetricsFile, Progress, StepControl
from .checkpoints import CheckpointMixin
from .finite import FiniteMixin
from .held_out import HeldOutMixin
from .quiet import quiet_libraries
from .router_biases import RouterBiases

__all__ = ["RunLimits", "RunTrainerMixin", "StopRequested", "training_arguments"]


class StopRequested(KeyboardInterrupt):
    """Training ended early on request, after writing a checkpoint."""


class RunTrainerMixin(FiniteMixin, CheckpointMixin, HeldOutMixin):
    """The mixin; it has to come first: `class OurTrainer(RunTrainerMixin, SFTTrainer)`.

    Args:
        limits: what to do about NaN, and how long to train.
        *args, **kwargs: the arguments of the trainer.
    """

    def __init__(self, *args: Any, limits: RunLimits | None = None, **kwargs: Any):
        self.limits = limits or RunLimits()
        self.stop_asked = False
        self._began: float | None = None
        self._signals = ExitStack()
        model = kwargs["model"] if "model" in kwargs else args[0]
        train_in_float32(model)
        if isinstance(model, PeftModel) and is_sharded(model):
            check_bias_updates(model.config, "the checkpoints of shared weights hold factors of adapters only")
        quiet_libraries()
        settings = kwargs["args"] if "args" in kwargs else args[1]
        only_model = settings.save_only_model
        settings.save_only_model = only_model or is_sharded(
            model
        )  # the Trainer refuses them; training/sharded.py saves
        super().__init__(*args, **kwargs)
        settings.save_only_model = only_model
        if is_sharded(model):  # autocast would keep copies of the weights of all layers
            accelerator: Any = self.accelerator
            accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.balance_log = BalanceLog(self.accelerator)
        self.router_biases = RouterBiases(self.accelerator, lambda: self.model, lambda: self.skipped_updates)
        self.remove_callback(PrinterCallback)
        patience = self.limits.early_stopping_patience
        for callback in (
            self.router_biases,
            StepControl(self._ask),
            MetricsFile(self.balance_log.take_shares, lambda: not self.stopped_early),
            Progress(),
            *([EarlyStoppingCallback(patience)] if patience is not None else []),
        ):
            self.add_callback(callback)

    # --- the loss -----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss plus, in training, the balance losses of its forward.

        The Trainer sums the losses of the micro-batches of an update. If it does not divide the sum by their number
        (because the main loss is already divided by a count over all of them), the balance losses are divided here.
        """
        self.remember(inputs, num_items_in_batch)
        with collect_balance(self.model) as ledger:
            result: Any = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)
        self.balance_log.add(ledger, micro_batches)
        self.router_biases.add(ledger)
        if not ledger.losses:
            return result
        balance = torch.stack(ledger.losses).mean()
        if self._loss_is_scaled(num_items_in_batch):
            balance = balance / micro_batches
        if return_outputs:
            return result[0] + balance, result[1]
        return result + balance

    @property
    def balances(self) -> bool:
        """Whether balance losses are part of the loss."""
        return any(getattr(self.model.config, name) for name in COEFFICIENTS.values())

    def _loss_is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether `compute_loss` returns a micro-batch's share of the update's loss, by the rule of
        Trainer.training_step."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.18 and later
        if scaled is not None:
            return scaled
        by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_items or self.compute_loss_func is not None

    # --- the log ------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.count_loss(logs["loss"])
        if "train_runtime" in logs:  # training has ended
            self._stop_late()
            logs.update(self._summary())
        if "loss" in logs and self.model.training:
            logs.update(self.balance_log.take(logs["loss"], self.model.config) | self.router_biases.logs())
            if self.skipped_updates:
                logs["skipped_updates"] = self.skipped_updates
        super().log(logs, *args, **kwargs)

    def _summary(self) -> dict[str, float]:
        """Figures of the whole run, including the time before a resume."""
        steps, seconds = self.state.global_step, max(self.seconds, 1e-9)
        return {
            "train_runtime": seconds,
            "train_samples_per_second": steps * self.get_total_train_batch_size(self.args) / seconds,
            "train_steps_per_second": steps / seconds,
            "train_loss": self.train_loss,
        }

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A no-op: TRL would write a README.md at every checkpoint, but runs have a manifest."""

    def _send_telemetry(self) -> None:
        """A no-op: TRL would report each trainer to the hub, but nothing of a run may leave the machine."""

    # --- beginning, end and resume ------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        """Train; with a checkpoint directory, resume from it, with the same results as without the interruption.

        Raises:
            StopRequested: after `request_stop` or the first SIGINT or SIGTERM, once the step is finished and a
                checkpoint is written.
            ModelError: a loss or gradient is not finite and `limits.on_nan` is "stop", the disk is full, or there are
                fewer rows than one batch.
        """
        rows: Any = self.train_dataset
        wait_at_most(self.args.ddp_timeout)  # in the groups of shared weights too
        check_batches(self.args, len(rows))
        resume = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with self.full_disk_explained():
            self.prepare_files(resume)
            if resume is not None and (done := self.already_trained(resume)):
                return done
            if resume is None:
                self.on_fresh_start()
            reshard(self.model)
            self._began = time.monotonic()
            with self._signals, at("training"):
                self._signals.enter_context(self._stop_on_signals())
                output = super().train(resume_from_checkpoint=str(resume) if resume else None, **kwargs)
        self.seconds_before, self._began = self.seconds, None
        if self.stopped_early:
            raise StopRequested(f"stopped at step {self.state.global_step}; checkpoint written")
        return output

    def on_fresh_start(self) -> None:
        """Called before the first step of a run that does not resume; its files have been emptied."""

    def request_stop(self) -> None:
        """End training after the current step, with a checkpoint; `train` then raises StopRequested."""
        self.stop_asked = True

    def _ask(self) -> tuple[bool, bool]:
        """(stop with a checkpoint, a limit is reached), agreed on by all processes."""
        seconds, tokens = self.limits.max_seconds, self.limits.max_tokens
        limit_reached = (seconds is not None and self.seconds >= seconds) or (
            tokens is not None and self.tokens >= tokens
        )
        stop, limit_reached = self._agreed(self.stop_asked, limit_reached)
        self.stopped_early = self.stopped_early or stop
        self.at_end = limit_reached or self.state.global_step >= self.state.max_steps
        return stop, limit_reached

    def _agreed(self, *answers: bool) -> list[bool]:
        """Each answer, true if it is true on any process."""
        votes = torch.tensor([float(answer) for answer in answers])
        if self.accelerator.num_processes > 1:
            votes = self.accelerator.reduce(votes.to(self.accelerator.device), reduction="sum")
        return [bool(answer) for answer in votes]

    def _stop_late(self) -> None:
        """Honour a stop that was requested after the last step, too late for `_ask`, with a checkpoint of that step.

        Signals have their usual effect from here on, so that none is lost between this and the end of `train`.
        """
        self._signals.close()
        if not self.stopped_early and self._agreed(self.stop_asked)[0]:
            if not (self.run_dir / f"checkpoint-{self.state.global_step}").is_dir():
                self._save_checkpoint(self.model, None)
            self.stopped_early = True

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including those before a resume but not what follows training."""
        return self.seconds_before + (time.monotonic() - self._began if self._began is not None else 0.0)

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Context manager in which the first SIGINT or SIGTERM requests a stop, and the next one has its usual
        effect."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous_handlers = {
            signal_number: signal.getsignal(signal_number) for signal_number in (signal.SIGINT, signal.SIGTERM)
        }

        def request(number: int, frame: FrameType | None) -> None:
            for signal_number, handler in previous_handlers.items():
                signal.signal(signal_number, handler)
            self.request_stop()

        for signal_number in previous_handlers:
            signal.signal(signal_number, request)
        try:
            yield
        finally:
            for signal_number, handler in previous_handlers.items():
                signal.signal(signal_number, handler)
