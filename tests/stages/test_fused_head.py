"""Our head in TRL's trainers, in place of theirs: the same figures, and adapters on lm_head train."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from deepseek_v2_modeling import apply_lora, lora_config
from deepseek_v2_modeling.loading import LoraSettings, ModelSource, load_model, prepare_trainable, read_adapter
from deepseek_v2_modeling.training.fused_head import HeadSettings, with_fused_head

from ..helpers.models import random_adapter, random_ids, small_model
from ..helpers.stages import assert_same_weights, byte_tokenizer, chat_model, lines, stopped_after
from .test_stage_rl import recipe as rl_recipe
from .test_stage_rl import run as run_rl
from .test_stage_sft import run as run_sft

LORA = LoraSettings(("attention.o", "lm_head"), 4, 8)


def start(folder: Path) -> Any:
    """A fresh adapter, the same each time, on a base that lies beside."""
    chat_model(seed=3).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(0)
    return prepare_trainable(ModelSource(str(folder / "base")), lora=LORA, merge_dir=folder / "merged")


def head_factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if "lm_head.lora_" in name}


@pytest.mark.parametrize("run", [run_sft, run_rl])
def test_the_head_trains_and_resumes(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sft.stage.SAMPLE_TOKENS", 4)
    before = {name: value.clone() for name, value in head_factors(start(tmp_path)).items()}
    run(tmp_path / "whole", model=start(tmp_path))
    trained = load_model(ModelSource(str(tmp_path / "base"), read_adapter(tmp_path / "whole" / "final")))
    after = head_factors(trained)
    assert after.keys() == before.keys() and not any(torch.equal(after[name], before[name]) for name in after)
    checkpoint = stopped_after(tmp_path / "whole" / "checkpoint-2", tmp_path / "again")
    run(tmp_path / "again", model=start(tmp_path), resume_from=checkpoint)
    assert_same_weights(
        trained, load_model(ModelSource(str(tmp_path / "base"), read_adapter(tmp_path / "again" / "final")))
    )


def test_the_first_loss_is_that_without_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A fresh adapter changes nothing: loss and figures are what TRL's head gives for the plain model."""
    monkeypatch.setattr("sft.stage.SAMPLE_TOKENS", 4)
    training = {"max_steps": 1, "save_steps": 1}
    run_sft(tmp_path / "head", model=start(tmp_path), training=training)
    run_sft(tmp_path / "plain", model=chat_model(seed=3), training=training)
    found, wanted = (lines(tmp_path / name / "metrics.jsonl")[0] for name in ("head", "plain"))
    for figure in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert found[figure] == pytest.approx(wanted[figure], abs=1e-4), figure


def test_scores_and_gradients_are_those_of_the_full_logits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deepseek_v2_modeling.kernels.token_scores.BLOCK_LOGITS", 200)
    model = random_adapter(small_model(), lora_config(["attention.o", "lm_head"], r=2))
    with with_fused_head(model, HeadSettings(temperature=0.7)):
        assert not hasattr(model.get_output_embeddings(), "lora_A")  # what TRL looks at
        add_fused_lm_head(model.get_base_model(), temperature=0.7)
    assert hasattr(model.get_output_embeddings(), "lora_A")
    ids = random_ids(2, 9)
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    scored = model(input_ids=ids, labels=labels, fused_lm_head=True)
    logps = (model(input_ids=ids).logits[:, :-1] / 0.7).log_softmax(-1)
    wanted = logps.gather(-1, ids[:, 1:, None]).squeeze(-1) * (labels[:, 1:] != -100)
    torch.testing.assert_close(scored.log_probs, wanted, rtol=0, atol=1e-5)
    assert torch.equal(scored.is_top1, (logps.argmax(-1) == labels[:, 1:]))
    own = list(head_factors(model))
    parameters = dict(model.named_parameters())
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    for name in own:
        found, full = (
            torch.autograd.grad((values * weights).sum(), parameters[name], retain_graph=True)[0]
            for values in (scored.log_probs, wanted)
        )
        torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("float32", [True, False])
def test_figures_are_those_of_trls_own_head(adapted: bool, float32: bool):
    """Where TRL's can be had: the head without adapters on it."""
    found, wanted = (small_model().bfloat16() for _ in range(2))
    if adapted:
        found, wanted = (apply_lora(model, lora_config(["attention.o"], r=2)) for model in (found, wanted))
    settings = {"temperature": 0.7, "cast_lm_head_to_fp32": float32}
    for model in (found, wanted):
        base = model.get_base_model() if adapted else model
        if float32:
            base.lm_head.float()
        fields = ("log_probs", "entropy", "is_top1")
        with with_fused_head(model, HeadSettings(0.7, float32)) if model is found else nullcontext():
            add_fused_lm_head(base, **settings, outputs=fields)
    ids = random_ids(2, 5)
    labels = ids.masked_fill(torch.arange(5) == 2, -100)
    scores = [model(input_ids=ids, labels=labels, fused_lm_head=True) for model in (found, wanted)]
    assert type(scores[0]).__name__ == "ScoredTokens" and type(scores[1]).__name__ == "FusedCausalLMOutput"
    for field in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(scores[0], field), getattr(scores[1], field), rtol=0, atol=2e-2, msg=field)


def test_a_float32_head_does_not_go_with_adapters_on_it(tmp_path: Path):
    lora = {"targets": ["lm_head"], "r": 2}
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32 cannot be combined with lm_head"):
        rl_recipe(tmp_path, lora=lora, training={"cast_lm_head_to_fp32": True})
