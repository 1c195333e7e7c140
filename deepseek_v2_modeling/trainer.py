"""What every trainer of a DeepSeek-V2 model needs, as one mixin to put before a transformers or TRL trainer.

Balance losses in the loss, expert load in the log, float32 weights under bf16 computation, whole checkpoints, exact
resume, a stop that keeps the work, a limit of time. Needs transformers only.
"""

import dataclasses
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils.logging import disable_progress_bar

from .balance import collect_balance
from .balance_log import BalanceLog
from .errors import ModelError
from .loading import save_final
from .run_files import METRICS_FILE, SAMPLES_FILE, drop_lines_after, read_json, write_json
from .trainer_callbacks import MetricsFile, Progress, StepControl

RUN_STATE_FILE = "run_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
UNFINISHED = ".unfinished"  # checkpoints are written in here, then moved to their name


class StopRequested(KeyboardInterrupt):
    """Training ended early because it was asked to; a checkpoint was written."""


@dataclass(frozen=True)
class RunLimits:
    """on_nan: stop the run at a loss or gradient that is not finite, or leave out that update.
    max_seconds: end training, as if the last step were reached, after so many seconds of it."""

    on_nan: Literal["stop", "skip"] = "stop"
    max_seconds: float | None = None


def training_arguments(
    training: dict[str, Any],
    *,
    run_dir: Path,
    seed: int,
    dtype: str,
    limits: RunLimits,
    has_eval: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for a TRL (or transformers) training config: the recipe's, our defaults, and what we own.

    Raises:
        ModelError: a type of computation that this machine can not train in, or evaluation without rows for it.
    """
    strategy = training.get("eval_strategy", "no")
    if strategy != "no" and not has_eval:
        raise ModelError(f"training.eval_strategy is {strategy}, and there is no eval_data to evaluate on")
    on_cpu = bool(training.get("use_cpu", not torch.cuda.is_available()))
    if on_cpu and dtype == "float16":
        raise ModelError("model.dtype float16 trains on a GPU only; use bfloat16 or float32")
    defaults = {
        "logging_steps": 1,
        "save_total_limit": 2,
        "dataloader_pin_memory": not on_cpu,
        "per_device_eval_batch_size": training.get("per_device_train_batch_size", 8),
        "ddp_find_unused_parameters": False,
        "report_to": "none",
    }
    ours = {
        "output_dir": str(run_dir),
        "seed": seed,
        "data_seed": seed,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        "disable_tqdm": True,
        "logging_nan_inf_filter": limits.on_nan == "skip",
    }
    return {**defaults, **_with_known_names(training), **ours}


def _with_known_names(training: dict[str, Any]) -> dict[str, Any]:
    """`gradient_checkpointing` under the name that this transformers has for it; off unless the recipe says on."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    named = {key.replace(old, new) if new in known else key: value for key, value in training.items()}
    return {new if new in known else old: False, **named}


class RunTrainerMixin(Trainer if TYPE_CHECKING else object):
    """Put it first: `class OurTrainer(RunTrainerMixin, SFTTrainer)`.

    Args:
        limits: what to do about NaN, and how long to train.
        *args, **kwargs: the trainer's own.
    """

    def __init__(self, *args: Any, limits: RunLimits | None = None, **kwargs: Any):
        self.limits = limits or RunLimits()
        self.stop_asked = False
        self.stopped_early = False
        self.skipped_updates = 0
        self._saving = False
        self._seconds_before = 0.0  # spent by the runs that this one goes on from
        self._began = time.monotonic()
        model = kwargs["model"] if "model" in kwargs else args[0]
        trained_in_float32(model)
        quiet_libraries()
        super().__init__(*args, **kwargs)
        self.balance_log = BalanceLog(self.accelerator)
        self.remove_callback(PrinterCallback)
        for callback in (
            StepControl(self._ask),
            MetricsFile(self.balance_log.take_shares, lambda: not self.stopped_early),
            Progress(),
        ):
            self.add_callback(callback)

    # --- the loss -----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss plus, in training, the balance losses of the forward that made it.

        The Trainer sums the losses of the micro-batches of one update. Where nobody divides that sum by their
        number (because the main loss is divided by a count over all of them), we divide the balance losses.
        """
        with collect_balance(self.model) as ledger:
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)
        self.balance_log.add(ledger, micro_batches)
        if not ledger.losses:
            return result
        balance = torch.stack(ledger.losses).mean()
        if self._loss_is_scaled(num_items_in_batch):
            balance = balance / micro_batches
        if return_outputs:
            return result[0] + balance, result[1]
        return result + balance

    def _loss_is_scaled(self, num_items_in_batch: Any) -> bool:
        """Does `compute_loss` return its share of the update's loss? The rule of Trainer.training_step."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_items or self.compute_loss_func is not None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.limits.on_nan == "stop" and not torch.isfinite(loss):
            raise ModelError(self._not_finite("loss", loss.item()))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not torch.isfinite(torch.as_tensor(norm)):
            if self.limits.on_nan == "stop":
                raise ModelError(self._not_finite("gradient", float(norm)))
            model.zero_grad(set_to_none=True)  # without gradients the optimizer leaves the weights alone
            self.skipped_updates += 1
        return norm

    def _not_finite(self, what: str, value: float) -> str:
        return (
            f"the {what} is {value} at step {self.state.global_step + 1}: lower training.learning_rate, look at the "
            "data of that step, or set on_nan: skip; checkpoints before it are whole"
        )

    # --- the log ------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.model.training:
            logs.update(self.balance_log.take(logs["loss"], self.model.config))
            if self.skipped_updates:
                logs["skipped_updates"] = self.skipped_updates
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a README.md into the run directory at every checkpoint: the manifest is ours."""

    def _send_telemetry(self) -> None:
        """TRL reports each trainer to its hub: nothing of a run leaves the machine."""

    # --- beginning, end and resume ------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        """Trains; goes on from a checkpoint directory, to the same numbers, when one is given.

        Raises:
            StopRequested: after `request_stop` or the first SIGINT or SIGTERM; the step was finished and a
                checkpoint was written.
        """
        resume = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._prepare_files(resume)
        if resume is not None and (done := self._already_trained(resume)):
            return done
        if resume is None:
            self.on_fresh_start()
        self._began = time.monotonic()
        with self._stop_on_signals():
            output = super().train(resume_from_checkpoint=str(resume) if resume else None, **kwargs)
        if self.stopped_early:
            raise StopRequested(f"stopped at step {self.state.global_step}; checkpoint written")
        return output

    def on_fresh_start(self) -> None:
        """Called before the first step of a run that goes on from no checkpoint; its files are empty by then."""

    def request_stop(self) -> None:
        """Ends training after the step that runs now, with a checkpoint; `train` then raises StopRequested."""
        self.stop_asked = True

    def _ask(self) -> tuple[bool, bool]:
        """(stop with a checkpoint, the time is up), agreed on by all processes."""
        limit = self.limits.max_seconds
        answers = torch.tensor([float(self.stop_asked), float(limit is not None and self.seconds >= limit)])
        if self.accelerator.num_processes > 1:
            answers = self.accelerator.reduce(answers.to(self.accelerator.device), reduction="sum")
        stop = bool(answers[0]) and self.state.global_step < self.state.max_steps
        self.stopped_early = self.stopped_early or stop
        return stop, bool(answers[1])

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._began

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks for a stop; the next one does what it usually does."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: FrameType | None) -> None:
            for which, handler in usual.items():
                signal.signal(which, handler)
            self.request_stop()

        for which in usual:
            signal.signal(which, ask)
        try:
            yield
        finally:
            for which, handler in usual.items():
                signal.signal(which, handler)

    def _prepare_files(self, resume: Path | None) -> None:
        """Leaves in the run directory what belongs to the steps before the start."""
        step = -1
        if resume is not None:
            step = TrainerState.load_from_json(str(resume / TRAINER_STATE_FILE)).global_step
            saved = read_json(resume / RUN_STATE_FILE)
            self._seconds_before = saved["seconds"]
            self.skipped_updates = saved["skipped_updates"]
            if hasattr(self, "_total_train_tokens"):  # TRL counts from 0 after a resume
                self._total_train_tokens = saved["tokens"]
        if self.is_world_process_zero():
            folder = Path(self._get_output_dir(None))
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            for name in (METRICS_FILE, SAMPLES_FILE):
                drop_lines_after(folder / name, step)
        self.accelerator.wait_for_everyone()

    def _already_trained(self, checkpoint: Path) -> TrainOutput | None:
        """The Trainer goes one step too far from a checkpoint of the last step: then only load it."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_FILE))
        if state.global_step < state.max_steps:
            return None
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return TrainOutput(state.global_step, 0.0, {})

    def finish(self, dtype: str, beside: dict[str, Any] | None = None) -> Path:
        """Writes final/ (a full model in `dtype`, an adapter as it is) with the tokenizer; the main process only.

        Args:
            dtype: of the weights of a full model.
            beside: further JSON files to put into final/, name -> content.

        Returns:
            Its path, once it is there for every process.
        """
        folder = Path(self._get_output_dir(None)) / "final"
        self.model.config.use_cache = True  # the Trainer turned it off, and it would be saved so
        if self.args.should_save:
            unfinished = folder.parent / UNFINISHED / folder.name
            save_final(self.model, self.processing_class, unfinished, dtype=dtype)
            for name, content in (beside or {}).items():
                write_json(unfinished / name, content)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(unfinished, folder)
            shutil.rmtree(unfinished.parent)
        self.accelerator.wait_for_everyone()
        return folder

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint under a temporary name, then renames it; old ones are removed after that."""
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            self._save_extra(folder)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        home = Path(self._get_output_dir(trial))
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(home / f"checkpoint-{self.state.best_global_step}")
        if self.args.should_save:
            self._publish(folder, home)
        self.accelerator.wait_for_everyone()

    def _save_extra(self, folder: Path) -> None:
        """What a checkpoint needs besides the Trainer's files; called on every process."""

    def _publish(self, folder: Path, home: Path) -> None:
        tokens = getattr(self, "_total_train_tokens", 0)
        write_json(
            folder / RUN_STATE_FILE,
            {"seconds": self.seconds, "tokens": tokens, "skipped_updates": self.skipped_updates},
        )
        self.state.save_to_json(str(folder / TRAINER_STATE_FILE))
        target = home / folder.name
        if target.exists():
            os.replace(target, folder.with_name(f"old-{folder.name}"))
        os.replace(folder, target)
        shutil.rmtree(folder.parent)
        remove_old_checkpoints(home, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The Trainer loads a full model key by key, and would leave the experts as they are: their keys on disk
        are the hub's, one for each expert."""
        model = self.model if model is None else model
        if hasattr(model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        kind: Any = type(model)
        saved = kind.from_pretrained(resume_from_checkpoint, config=model.config, dtype=torch.float32)
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def quiet_libraries() -> None:
    """No bars for single files, and no notes on names that the libraries use among themselves."""
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")


def trained_in_float32(model: nn.Module) -> None:
    """Makes trainable weights float32: bf16 ones would hardly move (DESIGN.md, "Precision")."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def checkpoint_step(folder: Path) -> int:
    """The step of a directory named checkpoint-N; -1 for another name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and number != folder.name else -1


def remove_old_checkpoints(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Keeps the newest `limit` checkpoints and the best one; None keeps all."""
    if not limit:
        return
    found = [path for path in run_dir.glob("checkpoint-*") if checkpoint_step(path) >= 0]
    for path in sorted(found, key=checkpoint_step)[:-limit]:
        if best is None or path.name != Path(best).name:
            # Under its own name a directory is whole: rename before taking it apart.
            doomed = path.with_name(f".{path.name}.old")
            os.replace(path, doomed)
            shutil.rmtree(doomed)
