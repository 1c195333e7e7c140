"""TRL's own trainers: their losses leave the balance losses out, which is said, and RunTrainerMixin puts them in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from deepseek_v2_modeling import RunTrainerMixin, modeling

from ..helpers.stages import byte_tokenizer, chat_model, conversations, pairs, score_model, user

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"


def columns(rows: list[dict[str, Any]], *names: str) -> Dataset:
    return Dataset.from_list([{name: row[name] for name in names} for row in rows])


PAIRS = columns(pairs(8), "prompt", "chosen", "rejected")
PROMPTS = Dataset.from_list([{"prompt": user(f"{i}")} for i in range(8)])
CHATS = columns(conversations(16), "messages")
STOCK: dict[str, tuple[Any, Any, Any, dict[str, Any], dict[str, Any]]] = {
    "SFT": (SFTTrainer, SFTConfig, CHATS, {"max_length": 64}, {}),
    "SFT, packed": (SFTTrainer, SFTConfig, CHATS, {"max_length": 64, "packing": True}, {}),
    "DPO": (DPOTrainer, DPOConfig, PAIRS, {"max_length": 64}, {}),
    "reward": (RewardTrainer, RewardConfig, PAIRS, {"max_length": 64}, {}),
    "GRPO": (
        GRPOTrainer,
        GRPOConfig,
        PROMPTS,
        {"num_generations": 2, "max_completion_length": 4},
        {"reward_funcs": lambda completions, **_: [float(i % 2) for i in range(len(completions))]},
    ),
}


@pytest.mark.parametrize("name", STOCK)
def test_balance_losses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stock, config, rows, settings, more = STOCK[name]
    said: list[str] = []
    monkeypatch.setattr(modeling.logger, "warning_once", said.append)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE

    class Mixed(RunTrainerMixin, stock):
        pass

    start = (score_model if name == "reward" else chat_model)(aux_loss_alpha=5.0)
    start.save_pretrained(tmp_path / "model")
    losses = []
    for cls in (stock, Mixed):
        torch.manual_seed(0)
        trainer = cls(
            model=type(start).from_pretrained(tmp_path / "model").train(),
            args=config(
                output_dir=str(tmp_path / "run"),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_steps=1,
                learning_rate=0.0,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            **more,
        )
        assert said == []
        trainer.train()
        losses.append(next(line["loss"] for line in trainer.state.log_history if "loss" in line))
        if cls is stock:
            assert said and "class MyTrainer(RunTrainerMixin, SFTTrainer)" in said[0]
            said.clear()
    assert said == []
    assert 4.9 < losses[1] - losses[0] < 10  # one MoE layer: 5 when its load is even, and more when it is not
