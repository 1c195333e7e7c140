"""Auxiliary-loss-free balancing: the routers' biases in training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock

from deepseek_v2_modeling import (
    ModelError,
    apply_lora,
    collect_balance,
    export_adapter,
    load_adapter,
    lora_config,
    merge_lora,
)
from deepseek_v2_modeling.esft import ExpertChoice
from deepseek_v2_modeling.esft.full_weights import train_chosen_experts
from deepseek_v2_modeling.layers.balance_losses import BalanceLedger
from deepseek_v2_modeling.loading import (
    LoraSettings,
    load_base,
    prepare_trainable,
    reason_not_to_share,
    resolve_source,
    save_directory,
)
from deepseek_v2_modeling.training.mixin import RunLimits
from deepseek_v2_modeling.training.router_biases import RouterBiases
from recipes.cli import main

from ..helpers.family import member
from ..helpers.models import logits_of, random_ids, relative, stock_twin, tokenizer
from ..helpers.plain_trainer import Spoiled, make, metrics
from ..helpers.stages import TINY, assert_same_weights, stopped_after

U = 0.01
IDS = random_ids(2, 12)


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


LORA = lora_config(("attention", "router", "experts"), r=2)


def adapted(base: Path, u: float = U) -> Any:
    return apply_lora(load_base(str(base), config={"bias_update_speed": u}), LORA).train()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_directory(v3(u=0.0), tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_brings_its_biases(base: Path, tmp_path: Path):
    """Into our model, stock PEFT's, a merge, a further training of the adapter, and another head."""
    model = adapted(base)
    before = biases(model)
    make(tmp_path / "run", model=model).train()
    model.eval()
    assert not torch.equal(biases(model), before)
    save_directory(model, tokenizer(), tmp_path / "adapter")
    wanted = logits_of(model, IDS)
    plain = load_base(str(base)).eval()
    again = load_adapter(plain, tmp_path / "adapter").eval()
    assert torch.equal(biases(again), biases(model)) and torch.equal(logits_of(again, IDS), wanted)
    stock_base = stock.DeepseekV3ForCausalLM.from_pretrained(base)
    peft = PeftModel.from_pretrained(stock_base, tmp_path / "adapter").eval()
    assert torch.equal(biases(peft), biases(model)) and relative(logits_of(peft, IDS), wanted) < 3e-6
    merge_lora(tmp_path / "adapter", tmp_path / "merged")
    merged = stock_twin(tmp_path / "merged", stock.DeepseekV3ForCausalLM)
    assert torch.equal(biases(merged), biases(model)) and relative(logits_of(merged, IDS), wanted) < 1e-5
    with pytest.raises(ModelError, match=r"servers do not read full tensors .*e_score_correction_bias"):
        export_adapter(tmp_path / "adapter", tmp_path / "exported")
    # trained on without moving biases, they stay in its file
    lora = LoraSettings(("attention", "router", "experts"), r=2)
    source = resolve_source(tmp_path / "adapter")
    further = prepare_trainable(source, lora=lora, merge_dir=tmp_path / "no")
    save_directory(further, tokenizer(), tmp_path / "further")
    assert torch.equal(biases(load_adapter(load_base(str(base)), tmp_path / "further")), biases(model))
    assert "other biases" in (reason_not_to_share(further, source, "float32") or "")


def test_an_adapter_of_attention_alone_brings_its_biases(base: Path, tmp_path: Path):
    """Its file names routers, and is not in the per-expert layout for that."""
    model = apply_lora(load_base(str(base), config={"bias_update_speed": U}), lora_config("attention", r=2))
    for name, bias in model.named_buffers():
        bias += name.endswith("bias")
    save_directory(model, tokenizer(), tmp_path / "adapter")
    assert torch.equal(biases(load_adapter(load_base(str(base)), tmp_path / "adapter")), biases(model))
    merge_lora(tmp_path / "adapter", tmp_path / "merged")
    assert torch.equal(biases(load_base(str(tmp_path / "merged"))), biases(model))
    other = LoraSettings(("attention", "experts"), r=2)
    source = resolve_source(tmp_path / "adapter")
    further = prepare_trainable(source, lora=other, merge_dir=tmp_path / "further")
    assert torch.equal(biases(further), biases(model))


def test_an_adapters_biases_resume(base: Path, tmp_path: Path):
    whole = adapted(base)
    make(tmp_path / "run", model=whole).train()
    half = stopped_after(tmp_path / "run" / "checkpoint-2", tmp_path / "half")
    resumed = adapted(base)
    make(half.parent, model=resumed).train(resume_from_checkpoint=half)
    assert torch.equal(biases(resumed), biases(whole)) and not torch.equal(biases(whole), biases(adapted(base)))


def test_without_a_speed_an_adapters_file_has_none(base: Path, tmp_path: Path):
    save_directory(adapted(base, u=0.0), tokenizer(), tmp_path / "adapter")
    assert not any("bias" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_what_is_refused_with_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(tmp_path / "base"), "--preset", "v3-mini"]) == 0
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "completion": "2", "reference": "2"}\n' * 20)
    head = "model: {path: base, config: {bias_update_speed: 0.001}}\nlora: {targets: [attention]}\noutput_dir: run\n"
    for more, message in (
        ("stage: rl\nrewards: [{rule: number}]\n", "with LoRA its reference is the same base"),
        ("stage: sft\nparallel: {fsdp: 2}\n", "with LoRA and parallel, checkpoints hold factors of adapters only"),
    ):
        (tmp_path / "r.yaml").write_text(f"{more}{head}data: [{{path: rows.jsonl}}]\n")
        assert main(["check", "r.yaml"]) == 2
        assert f"bias_update_speed is 0.001: {message}" in capsys.readouterr().err
