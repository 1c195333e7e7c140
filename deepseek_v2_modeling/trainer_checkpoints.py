"""Checkpoints and final/ that are whole under their names; going on from a checkpoint to the same numbers."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from .loading import save_final
from .run_files import METRICS_FILE, SAMPLES_FILE, drop_lines_after, read_json, write_json

RUN_STATE_FILE = "run_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
UNFINISHED = ".unfinished"  # directories are written in here, then moved to their name


class CheckpointMixin(Trainer if TYPE_CHECKING else object):
    """The part of `RunTrainerMixin` that writes and reads directories."""

    # Of many types in transformers and TRL, whose trainers this stands before.
    model: Any
    args: Any
    processing_class: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self.skipped_updates = 0
        self.seconds_before = 0.0  # of training, spent by the runs that this one goes on from
        self._saving = False
        super().__init__(*args, **kwargs)

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.seconds_before

    @property
    def run_dir(self) -> Path:
        return Path(super()._get_output_dir(None))

    def prepare_files(self, resume: Path | None) -> None:
        """Leaves in the run directory what belongs to the steps before the start."""
        step = -1
        if resume is not None:
            step = TrainerState.load_from_json(str(resume / TRAINER_STATE_FILE)).global_step
            saved = read_json(resume / RUN_STATE_FILE)
            self.seconds_before = saved["seconds"]
            self.skipped_updates = saved["skipped_updates"]
            if hasattr(self, "_total_train_tokens"):  # TRL counts from 0 after a resume
                self._total_train_tokens = saved["tokens"]
        if self.is_world_process_zero():
            shutil.rmtree(self.run_dir / UNFINISHED, ignore_errors=True)
            for name in (METRICS_FILE, SAMPLES_FILE):
                drop_lines_after(self.run_dir / name, step)
        self.accelerator.wait_for_everyone()

    def already_trained(self, checkpoint: Path) -> TrainOutput | None:
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
        folder = self.run_dir / "final"
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
        home = self.run_dir
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
        target: Any = self.model if model is None else model
        if hasattr(target, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, target)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, config=target.config, dtype=torch.float32)
        target.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


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
