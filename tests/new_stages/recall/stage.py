"""TRL's SFTTrainer on plain text."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from conversations.rendering.fitting import Encode, Fitter
from conversations.rendering.lengths import LengthReport
from conversations.stage import Work
from deepseek_v2_modeling.training import RunLimits, RunTrainerMixin, training_arguments
from recall.config import RecallRecipe


class RecallTrainer(RunTrainerMixin, SFTTrainer):
    """With the balance losses, and checkpoints that resume exactly."""


def run(recipe: RecallRecipe, work: Work) -> dict[str, Any]:
    trainer = _trainer(recipe, work.model, work.tokenizer, work.rows["data"], work.run_dir)
    output = trainer.train(work.resume_from)
    trainer.finish(recipe.model.dtype)
    return {"steps": output.global_step, "seconds": trainer.seconds, "tokens": trainer.tokens}


def planned_config(recipe: RecallRecipe) -> SFTConfig:
    return _config(recipe, Path(recipe.output_dir))


def rehearsal(recipe: RecallRecipe, model: Any, tokenizer: Any, run_dir: Path) -> RecallTrainer:
    return _trainer(recipe, model, tokenizer, [{"text": "a b"}] * 2, run_dir)


def encoder(recipe: RecallRecipe, tokenizer: Any, max_length: int | None) -> Encode:
    fitter = Fitter(tokenizer, max_length)
    return lambda row, report: [[piece] for piece in fitter.pieces(row, report)]


def _config(recipe: RecallRecipe, run_dir: Path) -> SFTConfig:
    given: dict[str, Any] = {"run_dir": run_dir, "seed": recipe.seed, "dtype": recipe.model.dtype}
    arguments = training_arguments(recipe.training, **given, limits=RunLimits(recipe.on_nan))
    return SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})


def _trainer(recipe: RecallRecipe, model: Any, tokenizer: Any, rows: Any, run_dir: Path) -> RecallTrainer:
    config, report = _config(recipe, run_dir), LengthReport()
    encode = encoder(recipe, tokenizer, config.max_length)
    pieces = [piece for row in rows for sample in encode(row, report) for piece in sample]
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids, _ in pieces])
    given: dict[str, Any] = {"args": config, "train_dataset": data, "processing_class": tokenizer}
    return RecallTrainer(model, **given, limits=RunLimits(recipe.on_nan))
