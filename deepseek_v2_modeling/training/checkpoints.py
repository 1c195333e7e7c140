"""Writes checkpoints and final/ atomically, and resumes from a checkpoint with identical results."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput

from ..adapters.loading import whole_embeddings
from ..adapters.router_biases import save_biases
from ..checkpoints.full_disk import UNFINISHED, checkpoint_bytes, checkpoint_step, checkpoints_of, full_disk_explained
from ..checkpoints.sources import FINAL
from ..checkpoints.tensor_files import follow_umask, whole_directory
from ..checkpoints.tokenizer_files import save_tokenizer
from ..errors import ModelError
from ..esft.full_weights import load_trained, save_trained
from ..loading import write_model
from ..sharding import as_if_whole, at, base_of, is_sharded, whole, whole_state
from . import sharded
from .checksums import write_sums
from .run_files import METRICS_FILE, SAMPLES_FILE, TRAINER_STATE_FILE, cut_file, write_json

RUN_STATE_FILE = "run_state.json"
GROWING = (METRICS_FILE, SAMPLES_FILE)


class CheckpointMixin(Trainer if TYPE_CHECKING else object):
    """The part of `RunTrainerMixin` that writes and reads checkpoints and final/."""

    # These have various types in the trainers of transformers and TRL that this mixin is combined with.
    model: Any
    args: Any
    processing_class: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self.skipped_updates = 0
        self.seconds_before = 0.0  # seconds of training before the run was resumed
        self.loss_sum = 0.0  # over all logged steps, including those before a resume
        self.logged_step = 0
        self.stopped_early = False
        self.at_end = False  # after the last step or at a limit, so that nothing is left to train
        self._saving = False
        super().__init__(*args, **kwargs)

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.seconds_before

    @property
    def tokens(self) -> int:
        """Tokens of all rows trained on so far, prompts included and padding not, over all processes."""
        return int(getattr(self, "_total_train_tokens", 0))

    @property
    def run_dir(self) -> Path:
        return Path(super()._get_output_dir(None))

    def prepare_files(self, resume: Path | None) -> None:
        """Restore the run directory to the state in which the checkpoint was written, or empty it without one."""
        sizes: dict[str, int] = {}
        if resume is not None:
            saved = _run_state(resume)
            sizes = saved["files"]
            self.seconds_before = saved["seconds"]
            self.skipped_updates = saved["skipped_updates"]
            self.loss_sum, self.logged_step = saved["loss_sum"], checkpoint_step(resume)
            if hasattr(self, "_total_train_tokens"):  # TRL counts from 0 after a resume
                self._total_train_tokens = saved["tokens"]
        if self.is_world_process_zero():
            shutil.rmtree(self.run_dir / UNFINISHED, ignore_errors=True)
            for leftover in self.run_dir.glob(".checkpoint-*.old"):
                shutil.rmtree(leftover)
            for name in GROWING:
                _report_lost_lines(self.run_dir / name, sizes.get(name, 0))
                cut_file(self.run_dir / name, sizes.get(name, 0))
        self.accelerator.wait_for_everyone()

    def already_trained(self, checkpoint: Path) -> TrainOutput | None:
        """If training had ended with this checkpoint, load it and return its output (the Trainer would run a further
        step); otherwise None."""
        if not _run_state(checkpoint)["ended"]:
            return None
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_FILE))
        state.is_world_process_zero, state.is_local_process_zero = (
            self.is_world_process_zero(),
            self.is_local_process_zero(),
        )
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        self.log({"train_runtime": self.seconds, "total_flos": state.total_flos})
        if self.args.load_best_model_at_end and state.best_global_step:
            self._load_best_model()
        return TrainOutput(state.global_step, self.train_loss, {})

    @property
    def train_loss(self) -> float:
        """The mean loss of all steps."""
        return self.loss_sum / max(1, self.state.global_step)

    def count_loss(self, mean: float) -> None:
        """Add a logged loss, the mean over the steps since the last log, to the running sum."""
        self.loss_sum += mean * (self.state.global_step - self.logged_step)
        self.logged_step = self.state.global_step

    def full_disk_explained(self) -> Any:
        """Context manager for code that writes to the run directory; see checkpoints/full_disk.py."""
        return full_disk_explained(self.run_dir, lambda: checkpoint_bytes(self.model, getattr(self, "optimizer", None)))

    def finish(self, dtype: str, beside: dict[str, Any] | None = None) -> Path:
        """Write final/ with the model or adapter and the tokenizer; only the main process writes.

        Args:
            dtype: the dtype of the weights of a full model; adapters keep theirs.
            beside: further JSON files to put into final/, name -> content.

        Returns:
            Its path, after all processes have waited for it.

        Raises:
            ModelError: the disk is full, or final/ cannot be written.
        """
        folder = self.run_dir / FINAL
        self.model.config.use_cache = True  # the Trainer has turned it off, which would be saved
        with at(f"writing {folder}"):
            state = self.gathered()
        if self.args.should_save:
            with self.full_disk_explained(), whole_directory(folder, replace=True) as unfinished:
                self.write_final(unfinished, dtype, state)
                for name, content in (beside or {}).items():
                    write_json(unfinished / name, content)
        self.accelerator.wait_for_everyone()
        return folder

    def gathered(self) -> dict[str, torch.Tensor] | None:
        """The state of a sharded model (of an adapter its file's tensors), whole on the first process; None of any
        other."""
        if not is_sharded(self.model):
            return None
        if not isinstance(self.model, PeftModel):
            return whole_state(self.model)
        state = whole_state(self.model, trained_only=True)
        embeddings = {name: whole(tensor).cpu() for name, tensor in whole_embeddings(self.model).items()}
        return {**embeddings, **state} if state else {}

    def write_final(self, folder: Path, dtype: str, state: dict[str, torch.Tensor] | None) -> None:
        """Write the model or adapter and the tokenizer; on the first process."""
        with as_if_whole(base_of(self.model)):
            write_model(self.model, self.processing_class, folder, dtype, state)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint under a temporary name, rename it, and then remove old checkpoints."""
        self._saving = True
        try:
            with at(f"writing checkpoint-{self.state.global_step}"):
                super()._save_checkpoint(model, trial)
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                save_trained(self.model, folder)
                save_biases(self.model, folder)
                if isinstance(self.processing_class, PreTrainedTokenizerBase):
                    save_tokenizer(self.processing_class, folder)
            self._save_extra(folder)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        home = self.run_dir
        best = home / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir() or best.name == folder.name:
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self._publish(folder, home)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Of a sharded model, the first process writes only the files beside the weights: the shards have those."""
        if not is_sharded(self.model):
            super()._save(output_dir, state_dict)
            return
        assert output_dir is not None
        if self.args.should_save:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if hasattr(self.model, "peft_config"):
                self.model.peft_config["default"].save_pretrained(str(folder))
            base = base_of(self.model)
            base.config.architectures = [type(base).__name__.removeprefix("FSDP")]
            base.config.save_pretrained(str(folder))
            if base.can_generate():
                base.generation_config.save_pretrained(str(folder))
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):
            sharded.save_shards(self.model, self.optimizer, Path(output_dir))
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
            return
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (sharded.has_shards(Path(checkpoint)) or is_sharded(self.model)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        if sharded.has_shards(folder):
            sharded.load_optimizer(self.model, self.optimizer, folder)
        else:
            sharded.load_whole_optimizer(self.model, self.optimizer, folder / OPTIMIZER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _save_extra(self, folder: Path) -> None:
        """Save files that a checkpoint needs in addition to the Trainer's; called on every process."""

    def _publish(self, folder: Path, home: Path) -> None:
        run_state = {
            "seconds": self.seconds,
            "tokens": getattr(self, "_total_train_tokens", 0),
            "skipped_updates": self.skipped_updates,
            "loss_sum": self.loss_sum,
            "ended": self.control.should_training_stop and (self.at_end or not self.stopped_early),
            "files": {name: (home / name).stat().st_size for name in GROWING if (home / name).is_file()},
        }
        write_json(folder / RUN_STATE_FILE, run_state)
        self.state.save_to_json(str(folder / TRAINER_STATE_FILE))
        write_sums(folder)
        follow_umask(folder)
        target = home / folder.name
        if target.exists():
            os.replace(target, folder.with_name(f"old-{folder.name}"))
        os.replace(folder, target)
        shutil.rmtree(folder.parent)
        remove_old_checkpoints(home, self.args.save_total_limit or None, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load full models with `from_pretrained`: the Trainer loads them key by key and would not restore the experts,
        which have separate keys on disk."""
        target: Any = self.model if model is None else model
        folder = Path(resume_from_checkpoint)
        if sharded.has_shards(folder):
            sharded.load_weights(target, folder)
            return
        if is_sharded(target):
            sharded.load_whole_weights(target, folder)
            return
        if hasattr(target, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, target)
            return
        if load_trained(target, Path(resume_from_checkpoint)):
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, config=target.config, dtype=torch.float32)
        target.load_state_dict(saved.state_dict())

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """With load_best_model_at_end, save each new best model, regardless of the save interval."""
        try:
            better = super()._determine_best_metric(metrics, trial)
        except KeyError:
            raise ModelError(
                f"training.metric_for_best_model is {self.args.metric_for_best_model}, which no evaluation gives; "
                f"there are: {', '.join(key for key in metrics if key.startswith('eval_'))}"
            ) from None
        if better and self.args.load_best_model_at_end:
            self.control.should_save = True
        return better or self.stopped_early  # save_strategy best saves when this is true

    def _load_best_model(self) -> None:
        if self.stopped_early:  # the run will resume from its newest checkpoint, which must be kept
            return
        best = self.run_dir / f"checkpoint-{self.state.best_global_step}"
        self._load_from_checkpoint(str(best))
        if self.args.should_save and self.args.save_total_limit == 1:
            remove_old_checkpoints(
                self.run_dir, 0, best.name
            )  # otherwise the Trainer deletes it without renaming it first
        self.accelerator.wait_for_everyone()


def _run_state(checkpoint: Path) -> dict[str, Any]:
    """The run state that `_publish` wrote."""
    return json.loads((checkpoint / RUN_STATE_FILE).read_text(encoding="utf-8"))


def _report_lost_lines(path: Path, size: int) -> None:
    """Print a warning if a file is shorter than it was at the checkpoint, so that its record of training is
    incomplete."""
    actual = path.stat().st_size if path.is_file() else 0
    if actual < size:
        print(
            f"{path}: only {actual:,} of the {size:,} bytes that it had at the checkpoint; the missing lines stay "
            "missing, and training is not affected",
            file=sys.stderr,
        )


def remove_old_checkpoints(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest `limit` checkpoints and the best one; None keeps all."""
    if limit is None:
        return
    checkpoints = checkpoints_of(run_dir)
    for path in checkpoints[: max(0, len(checkpoints) - limit)]:
        if best is None or path.name != Path(best).name:
            # A directory under its own name must be complete: rename it before deleting its files.
            renamed = path.with_name(f".{path.name}.old")
            os.replace(path, renamed)
            shutil.rmtree(renamed)
