"""The memory that `dsv2 plan` states is what the steps of real trainers take."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import reward.stage
import rl.stage
import sft.stage
from conversations import render_conversation
from deepseek_v2_modeling import PRESETS, DeepseekV2Config, LatentCache, preset_config
from deepseek_v2_modeling.adapters import apply_lora
from deepseek_v2_modeling.loading import freeze_routers, model_class
from recipes.plan.load import Lengths, load_of
from recipes.plan.memory import Layout, Memory, memory
from recipes.runs.foundation import Foundation, lora_settings
from reward.config import RewardRecipe
from rl.config import RlRecipe
from sft.config import SftRecipe

from ..helpers.live_memory import LiveMemory
from ..helpers.rl import Vowels
from ..helpers.stages import SECTIONS, assistant, byte_tokenizer, user

LORA = {"targets": ["attention", "experts", "shared_experts"], "r": 8}
ROWS, WORDS, ANSWER = 3, 90, 24
ROOM = 1e12
WIDE = bool(os.environ.get("DSV2_WIDE"))  # all combinations, with all layers: several minutes


def rows(stage: str) -> list[dict[str, Any]]:
    """Rows of one length."""
    if stage == "sft":
        return [{"text": "x" * WORDS}] * 24
    if stage == "reward":
        return [{"prompt": user("x" * WORDS), "chosen": assistant("good"), "rejected": assistant("evil")}] * 24
    return [{"messages": user(f"{i:02}".rjust(WORDS, "x")) + assistant("y"), "reference": "1"} for i in range(24)]


class Metered(TrainerCallback):
    """Measures the second step. activations: its peak beside weights, gradients and the optimizer's state, after the
    first micro-batch; rollout: its peak before the first loss."""

    def __init__(self, trainer: Any):
        self.trainer, self.activations, self.rollout = trainer, 0, 0
        compute = trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            if self.meter is not None:
                if not self.losses:
                    self.rollout = self.meter.peak
                self.losses += 1
                self.meter.restart()
            return compute(*args, **kwargs)

        trainer.compute_loss = compute_loss
        self.meter: LiveMemory | None = None
        self.losses = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            moments = [value for values in self.trainer.optimizer.optimizer.state.values() for value in values.values()]
            self.meter = LiveMemory([*self.trainer.model.parameters(), *moments])
            self.meter.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.meter is not None:
            self.meter.__exit__(None, None, None)
            grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            self.gradients = sum(grad.nbytes for grad in grads)
            self.activations = self.meter.peak - self.gradients
            self.meter = None


def recipe_of(stage: str, folder: Path, lora: bool, checkpointing: bool) -> Any:
    cls = {"sft": SftRecipe, "reward": RewardRecipe, "rl": RlRecipe}[stage]
    training = {
        "per_device_train_batch_size": ROWS + (stage == "rl"),
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "save_strategy": "no",
        "gradient_checkpointing": checkpointing,
        **({"max_completion_length": ANSWER, "num_generations": 2, "beta": 0.1} if stage == "rl" else {}),
    }
    more = {"rewards": [{"rule": "format"}], "rollout": {"merge": False}} if stage == "rl" else {}
    lora_section = {"lora": LORA} if lora else {}
    sections = {**SECTIONS, **more, **lora_section, "stage": stage, "output_dir": str(folder), "training": training}
    return cls(**sections)


def trainer_of(stage: str, recipe: Any, settings: DeepseekV2Config, folder: Path) -> Any:
    torch.manual_seed(0)
    model: Any = model_class(settings, "score" if stage == "reward" else "causal_lm")(settings)
    if recipe.lora:
        model = apply_lora(model, lora_settings(recipe.lora).config("SEQ_CLS" if stage == "reward" else "CAUSAL_LM"))
    inputs: dict[str, Any] = {"model": model.train(), "tokenizer": byte_tokenizer(), "rows": rows(stage)}
    inputs["run_dir"] = folder
    if stage == "rl":
        freeze_routers(model)
        return rl.stage.build_trainer(recipe, rewards=[Vowels("vowels")], **inputs)
    return {"sft": sft.stage, "reward": reward.stage}[stage].build_trainer(recipe, eval_rows=[], **inputs)[0]


def measured_and_planned(
    stage: str, preset: str, lora: bool, checkpointing: bool, folder: Path
) -> tuple[dict[str, int], Memory]:
    settings = preset_config(preset)
    settings.num_labels = 1
    if not WIDE:
        settings.num_hidden_layers = min(3, settings.num_hidden_layers)
    recipe = recipe_of(stage, folder, lora, checkpointing)
    trainer = trainer_of(stage, recipe, settings, folder)
    metered = Metered(trainer)
    trainer.add_callback(metered)
    trainer.train()
    column = {"sft": "input_ids", "reward": "chosen_ids"}.get(stage)
    prompt = render_conversation(user("x" * WORDS), byte_tokenizer(), add_generation_prompt=True)["input_ids"]
    longest = len(trainer.train_dataset[0][column] if column else prompt)
    load = load_of(recipe, settings, Lengths(longest), Foundation(), on_cpu=True)
    measured = {"gradients": metered.gradients, "activations": metered.activations}
    return measured, memory(load, Layout(), ROOM)


EVERY = [
    (stage, preset, lora, checkpointing)
    for stage in ("sft", "reward", "rl")
    for preset in ("tiny", "v2-lite-mini", "v2-mini")
    for lora in (False, True)
    for checkpointing in (False, True)
]
SOME = [case for number, case in enumerate(EVERY) if number % 4 == (number // 4) % 4]  # each preset in each stage
PLAIN = [("sft", "deepseek-moe-mini", True, False)]


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process in which no other test has left anything, as a run's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(("stage", "preset", "lora", "checkpointing"), (EVERY if WIDE else SOME) + PLAIN)
def test_activations_are_as_planned(
    stage: str, preset: str, lora: bool, checkpointing: bool, tmp_path: Path, apart: ProcessPoolExecutor
) -> None:
    measured, planned = apart.submit(measured_and_planned, stage, preset, lora, checkpointing, tmp_path).result()
    assert planned.state["gradients"] == measured["gradients"]
    expected, activations = sum(planned.update.values()), measured["activations"]
    print(f"{stage} {preset} lora={lora} checkpointing={checkpointing} {expected / activations - 1:+.1%}")
    assert activations == pytest.approx(expected, rel=0.1 if checkpointing else 0.2)


def test_state_is_what_a_run_holds(tmp_path: Path) -> None:
    """Weights, adapters, gradients and moments of a real trainer, in bytes."""
    settings = DeepseekV2Config(**PRESETS["tiny"])
    recipe = recipe_of("sft", tmp_path, lora=True, checkpointing=False)
    recipe.model.dtype = "bfloat16"
    trainer = trainer_of("sft", recipe, settings, tmp_path)
    planned = memory(load_of(recipe, settings, Lengths(), Foundation(), on_cpu=True), Layout(), ROOM).state
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert planned["adapters"] == sum(p.nbytes for p in trained) == planned["gradients"]
    trainer.train()
    moments = [m for values in trainer.optimizer.optimizer.state.values() for m in values.values() if m.ndim]
    assert planned["optimizer's state"] == sum(m.nbytes for m in moments)


def test_the_cache_of_rollouts_is_what_it_takes() -> None:
    settings = DeepseekV2Config(**PRESETS["v2-lite-mini"])
    recipe = recipe_of("rl", Path("unused"), lora=False, checkpointing=False)
    load = load_of(recipe, settings, Lengths(104), Foundation())
    cache = LatentCache(settings)
    widths = (settings.kv_lora_rank, settings.qk_rope_head_dim)
    assert load.rollouts is not None
    tokens = load.rollouts.cache // (settings.num_hidden_layers * 4 * sum(widths))
    assert tokens == 104 + ANSWER
    for layer in range(settings.num_hidden_layers):
        latent, rope_key = (torch.zeros(8, 1, tokens, width) for width in widths)
        cache.update(latent, rope_key, layer)
    assert memory(load, Layout(), ROOM).rollouts["cache of 8 answers"] == cache.nbytes
