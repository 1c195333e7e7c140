"""Auxiliary-loss-free balancing: the routers' biases in training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek_v2_modeling import ModelError, apply_lora, collect_balance, lora_config
from deepseek_v2_modeling.esft import ExpertChoice
from deepseek_v2_modeling.esft.full_weights import train_chosen_experts
from deepseek_v2_modeling.layers.balance_losses import BalanceLedger
from deepseek_v2_modeling.training.mixin import RunLimits
from deepseek_v2_modeling.training.router_biases import RouterBiases
from recipes.cli import main

from ..helpers.family import member
from ..helpers.stages import TINY, assert_same_weights, stopped_after
from .test_trainer import Spoiled, make, metrics

U = 0.01


def v3(u: float = U, **changes: Any) -> Any:
    return member("v3", **{**TINY, "bias_update_speed": u, **changes}).train()


def biases(model: Any) -> torch.Tensor:
    return torch.stack([b.clone() for name, b in model.named_buffers() if name.endswith("bias")])


def test_a_step_moves_each_bias_towards_the_mean_load(tmp_path: Path):
    """The load is that of all micro-batches of the step."""
    model = v3()
    trainer = make(tmp_path, model=model, max_steps=1, gradient_accumulation_steps=2, learning_rate=0.0)
    before, counts = biases(model), 0
    with torch.no_grad():
        reference = v3()
    for batch in list(trainer.get_train_dataloader())[:2]:
        with collect_balance(reference) as ledger:
            reference(input_ids=batch["input_ids"], labels=batch["labels"])
        counts = counts + ledger.expert_counts
    trainer.train()
    load = counts.double()
    assert load.sum() == 2 * 4 * 12 * 3  # one MoE layer, 3 experts a token
    wanted = before + U * (load.mean(-1, keepdim=True) - load).sign().float()
    torch.testing.assert_close(biases(model), wanted)
    assert not torch.equal(wanted, before)
    line = next(line for line in metrics(tmp_path) if "loss" in line)
    assert line["router_bias/speed"] == U and line["router_bias/largest"] == pytest.approx(wanted.abs().max().item())


def test_the_load_is_that_of_all_processes():
    """Of two, here: what this one counted, and what the accelerator adds of the other."""
    model = v3()
    before, own, other = biases(model), torch.arange(16)[None], torch.arange(16)[None].flip(-1) * 3
    updates = RouterBiases(SimpleNamespace(reduce=lambda counts, reduction: counts + other), lambda: model, lambda: 0)
    updates.add(BalanceLedger(expert_counts=own))
    step: Any = None
    updates.on_step_end(step, step, step)
    load = (own + other).double()
    torch.testing.assert_close(biases(model), before + U * (load.mean() - load).sign().float())
    updates.on_step_end(step, step, step)  # nothing was counted since
    torch.testing.assert_close(biases(model), before + U * (load.mean() - load).sign().float())


def test_no_gradient_and_no_update_without_a_speed(tmp_path: Path):
    model = v3(u=0.0)
    before = biases(model)
    make(tmp_path, model=model, max_steps=2).train()
    assert torch.equal(biases(model), before)
    assert not any("router_bias/speed" in line for line in metrics(tmp_path))


def test_a_skipped_update_moves_no_bias(tmp_path: Path):
    model = v3()
    before = biases(model)
    make(tmp_path, Spoiled, model, RunLimits(on_nan="skip"), max_steps=2).train()
    moved = (biases(model) - before).abs() / U
    assert moved.max() == pytest.approx(1, abs=1e-3)  # of one step, not of two


@pytest.mark.parametrize("chosen", [False, True])
def test_resumed_to_the_same_biases(tmp_path: Path, chosen: bool):
    def fresh() -> Any:
        model = v3()
        if chosen:
            train_chosen_experts(model, ExpertChoice({1: (0, 3)}))
        return model

    whole = fresh()
    make(tmp_path / "run", model=whole).train()
    half = stopped_after(tmp_path / "run" / "checkpoint-2", tmp_path / "half")
    resumed = fresh()
    make(half.parent, model=resumed).train(resume_from_checkpoint=half)
    assert_same_weights(whole, resumed)
    assert not torch.equal(biases(whole), biases(v3()))


def test_refused_with_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    adapted = apply_lora(v3(), lora_config("attention", r=2))
    with pytest.raises(ModelError, match=r"bias_update_speed is 0\.01: with LoRA it must be 0"):
        make(tmp_path, model=adapted)
    assert main(["init", str(tmp_path / "base"), "--preset", "v3-mini"]) == 0
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "completion": "2"}\n' * 20)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "stage: sft\nmodel: {path: base, config: {bias_update_speed: 0.001}}\nlora: {targets: [attention]}\n"
        "data: [{path: rows.jsonl}]\noutput_dir: run\n"
    )
    assert main(["check", str(recipe)]) == 2
    assert "bias_update_speed is 0.001: with LoRA it must be 0" in capsys.readouterr().err
