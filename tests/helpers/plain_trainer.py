"""RunTrainerMixin on transformers' own Trainer, and runs of a tiny model with it."""

import torch
from transformers import Trainer, TrainingArguments

from deepseek_v2_modeling.training.mixin import RunLimits, RunTrainerMixin, training_arguments

from .models import random_ids
from .stages import chat_model, lines


class PlainTrainer(RunTrainerMixin, Trainer):
    pass


class Stopping(PlainTrainer):
    """Asks for a stop in the middle of a step."""

    stop_at = 2

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == self.stop_at:
            self.request_stop()
        return super().training_step(*args, **kwargs)


class Spoiled(PlainTrainer):
    """The loss of one step is not finite."""

    spoiled_step = 2

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step + 1 == self.spoiled_step else loss


def examples(n=24, length=12):
    ids = random_ids(n, length, vocab=200)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def make(tmp_path, cls=PlainTrainer, model=None, limits=None, **training):
    limits = limits or RunLimits()
    training = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "save_steps": 2, **training}
    arguments = training_arguments(training, run_dir=tmp_path, seed=5, dtype="float32", limits=limits, has_eval=True)
    model = chat_model() if model is None else model
    args = TrainingArguments(**arguments)
    return cls(model=model, args=args, train_dataset=examples(), eval_dataset=examples(4), limits=limits)


def metrics(folder):
    return lines(folder / "metrics.jsonl")


def steps(folder):
    return [line["step"] for line in metrics(folder) if "loss" in line]
