"""What a run of SFT does besides its steps: held-out loss by source, the best checkpoint, stops, faults, trackers."""

import errno
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils

from conversations import render_conversation
from conversations.errors import ToolkitError
from conversations.rendering.template import chat_template, install_template
from deepseek_v2_modeling import DeepseekV2ForCausalLM, ModelError
from deepseek_v2_modeling.checkpoints.full_disk import is_full
from deepseek_v2_modeling.training.nan_source import first_bad_module
from recipes.recipe.schema import validate
from recipes.runs.training_fields import check_training
from sft.config import SftRecipe
from sft.stage import train
from sft.trainer import ChatTrainer

from ..helpers.stages import SECTIONS, assistant, byte_tokenizer, chat_model, conversations, lines, stopped_after, user

TRAINING = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "max_length": 64, "save_steps": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.stage.SAMPLE_TOKENS", 2)


def run(
    run_dir: Path,
    *,
    eval_rows: Any = None,
    rows: Any = None,
    model: Any = None,
    resume_from: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    training = {**TRAINING, **changes.pop("training", {})}
    recipe = SftRecipe(**{**SECTIONS, "stage": "sft", "output_dir": str(run_dir), "training": training, **changes})
    tokenizer = byte_tokenizer()
    install_template(tokenizer)
    return train(
        recipe,
        model=model or chat_model(),
        tokenizer=tokenizer,
        rows=conversations(24) if rows is None else rows,
        eval_rows=eval_rows,
        run_dir=run_dir,
        resume_from=resume_from,
    )


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run_dir / "metrics.jsonl") if "eval_loss" in line]


def loss_of(model: Any, rows: list[dict[str, Any]]) -> float:
    """Over the trained tokens of all rows, each in a batch of its own."""
    total, count = 0.0, 0
    for row in rows:
        rendered = render_conversation(row["messages"], byte_tokenizer())
        ids, mask = torch.tensor([rendered["input_ids"]]), torch.tensor([rendered["assistant_mask"]])
        with torch.no_grad():
            loss = model.eval()(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss
        total, count = total + loss.item() * mask.sum().item(), count + int(mask.sum())
    return total / count


# --- the template -----------------------------------------------------------------------------------------------------


def test_every_checkpoint_carries_the_template(tmp_path: Path) -> None:
    run(tmp_path)
    messages = [{"role": "system", "content": "Be kind."}, *user("Hi"), *assistant("Hello"), *user("Bye")]
    for folder in ("checkpoint-2", "checkpoint-4", "final"):
        stock = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert stock.chat_template == chat_template(), folder
        text = stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == "<bos>Be kind.\n\nUser: Hi\n\nAssistant: Hello<eos>User: Bye\n\nAssistant:"
        ids = stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == render_conversation(messages, stock, add_generation_prompt=True)["input_ids"]


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_held_out_loss_by_source(tmp_path: Path, packing: bool) -> None:
    """Over tokens, not over batches: batches of other sizes, or packs, give the same loss."""
    long = [{"messages": user(f"again {i}") + assistant("word " * 6)} for i in range(3)]
    sources = {"sums": conversations(5), "words": long}
    metrics = run(tmp_path, eval_rows=sources, training={**EVALUATED, "eval_steps": 2, "packing": packing})
    found = evaluations(tmp_path)
    assert [line["step"] for line in found] == [2, 4]  # one line each: the last step is not evaluated again
    model = DeepseekV2ForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    losses = {
        "eval_loss": loss_of(model, [*sources["sums"], *sources["words"]]),
        "eval_sums_loss": loss_of(model, sources["sums"]),
        "eval_words_loss": loss_of(model, sources["words"]),
    }
    for key, loss in losses.items():
        assert found[-1][key] == metrics[key] == pytest.approx(loss, rel=1e-4), key


def test_held_out_rows_left_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"messages": user("x" * 90) + assistant("late"), "origin": "b.jsonl:6"}
    run(tmp_path, eval_rows={"b": [*conversations(2), long]}, format={"too_long": "drop"}, training={"max_steps": 1})
    assert "sft: eval_data b: 3 rows; 1 dropped (longer than 64 tokens)" in capsys.readouterr().err
    assert [row["origin"] for row in lines(tmp_path / "rejected.jsonl")] == ["b.jsonl:6"]
    assert len(evaluations(tmp_path)) == 1  # without eval_strategy: once, at the end


def test_the_best_checkpoint_is_kept_and_is_the_result(tmp_path: Path) -> None:
    """Also where its step is not one of save_steps: each new best one is saved."""
    best_first = {**EVALUATED, "load_best_model_at_end": True, "save_total_limit": 1, "save_steps": 4}
    # A good start, then a learning rate that ruins it.
    schedule = {"learning_rate": 0.5, "lr_scheduler_type": "linear", "warmup_steps": 4}
    metrics = run(tmp_path, eval_rows=conversations(30)[24:], training={**best_first, **schedule})
    losses = {line["step"]: line["eval_loss"] for line in evaluations(tmp_path)}
    best = min(losses, key=losses.__getitem__)
    assert best not in (4,) and len(losses) == 4
    assert metrics["eval_loss"] == losses[best]
    final = DeepseekV2ForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    assert loss_of(final, conversations(30)[24:]) == pytest.approx(losses[best], rel=1e-4)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]


def test_early_stopping_counts_evaluations_without_progress(tmp_path: Path) -> None:
    settings = {**EVALUATED, "max_steps": 50, "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    metrics = run(tmp_path, eval_rows=conversations(4), early_stopping_patience=2, training=settings)
    losses = [line["eval_loss"] for line in evaluations(tmp_path)]
    best = losses.index(min(losses))
    assert metrics["steps"] == len(losses) == best + 1 + 2


@pytest.mark.parametrize("back", [1, 2])
def test_a_resumed_run_stops_as_early(tmp_path: Path, back: int) -> None:
    """From the last checkpoint it trains no further; from an earlier one it knows what was counted by then."""
    settings = {**EVALUATED, "max_steps": 50, "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    settings |= {"save_steps": 1, "save_total_limit": 9}
    common = {"eval_rows": conversations(4), "early_stopping_patience": 2, "training": settings}
    metrics = run(tmp_path / "a", **common)
    checkpoint = stopped_after(tmp_path / "a" / f"checkpoint-{metrics['steps'] + 1 - back}", tmp_path / "b")
    again = run(tmp_path / "b", model=chat_model(seed=1), resume_from=checkpoint, **common)
    assert again["steps"] == metrics["steps"] and again["eval_loss"] == metrics["eval_loss"]
    one, other = (
        [{k: v for k, v in line.items() if not k.endswith(("_runtime", "_per_second"))} for line in found]
        for found in (lines(tmp_path / name / "metrics.jsonl") for name in "ab")
    )
    assert one == other


def test_early_stopping_needs_evaluations() -> None:
    common = {**SECTIONS, "stage": "sft", "output_dir": "o", "early_stopping_patience": 2}
    with pytest.raises(ModelError, match=r"counts evaluations: give eval_data"):
        check_training(validate(common))
    check_training(validate({**common, "eval_data": [{"path": "y.jsonl"}], "training": EVALUATED}))
    with pytest.raises(ToolkitError, match="write early_stopping_patience at the recipe's top level"):
        check_training(validate({**common, "training": {"early_stopping_patience": 2}}))


def test_the_metric_of_the_best_checkpoint_is_checked_before_the_run() -> None:
    sources = [{"path": "a/law.jsonl.gz"}, {"path": "b/law.csv"}, {"path": "tiny:sft_heldout?seed=3"}]

    def check(metric: str) -> None:
        training = {**EVALUATED, "metric_for_best_model": metric}
        check_training(
            validate({**SECTIONS, "stage": "sft", "output_dir": "o", "eval_data": sources, "training": training})
        )

    for metric in ("loss", "eval_law_loss", "law_2_loss", "eval_sft_heldout_loss", "mean_token_accuracy"):
        check(metric)
    with pytest.raises(ToolkitError, match="'laws_loss' is not one of loss, law_loss, law_2_loss, sft_heldout_loss"):
        check("laws_loss")


# --- passed through to TRL --------------------------------------------------------------------------------------------


def test_neftune_adds_noise_in_training_alone(tmp_path: Path) -> None:
    once = {"max_steps": 1, "save_strategy": "no"}
    rows = conversations(4)
    plain = run(tmp_path / "a", rows=rows, eval_rows=rows, training={**once, "learning_rate": 0.0})
    noisy = run(
        tmp_path / "b", rows=rows, eval_rows=rows, training={**once, "learning_rate": 0.0, "neftune_noise_alpha": 50.0}
    )
    a, b = (lines(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in "ab")
    assert a != b
    assert plain["eval_loss"] == pytest.approx(noisy["eval_loss"], rel=1e-6)  # one batch is padded, the other is not


def test_a_tracker_gets_what_metrics_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append({"step": state.global_step, **logs})

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracker", Tracker)
    run(tmp_path, training={"max_steps": 2, "report_to": "tracker"})
    for line, logged in zip(lines(tmp_path / "metrics.jsonl"), seen, strict=True):
        assert logged.items() <= line.items()


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"report_to": "wand"}, "training.report_to: 'wand' is not one of none, all, .*tensorboard, trackio, wandb"),
        ({"report_to": ["none", "tensorbord"]}, "training.report_to: 'tensorbord' is not one of"),
        ({"report_to": "swanlab"}, "training.report_to: swanlab is not installed; pip install swanlab"),
        ({"use_liger_kernel": True}, "training.use_liger_kernel is set by the toolkit; Liger's DeepSeek-V2 kernels"),
    ],
)
def test_what_cannot_work_is_refused_by_name(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolkitError, match=message):
        check_training(validate({**SECTIONS, "stage": "sft", "output_dir": "o", "training": training}))


# --- faults -----------------------------------------------------------------------------------------------------------


def numbered(n: int) -> list[dict[str, Any]]:
    return [{**row, "origin": f"law.jsonl:{i}"} for i, row in enumerate(conversations(n), 1)]


class Overflowing(torch.nn.Module):
    """Gives an infinity for the rows that hold a certain token."""

    def __init__(self, norm: torch.nn.Module, bad: Any):
        super().__init__()
        self.norm, self.bad = norm, bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) * (torch.inf if self.bad() else 1.0)


@pytest.mark.parametrize("packing", [False, True])
def test_nan_names_step_rows_and_module(tmp_path: Path, packing: bool) -> None:
    model = chat_model()
    bad = byte_tokenizer()("7")["input_ids"][0]  # "7 + 1" is row 8; "6 + 1 = 7" is left out
    held: list[bool] = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: held.append(module.training and bool((args[0] == bad).any()))
    )
    layer = model.model.layers[1]
    layer.post_attention_layernorm = Overflowing(layer.post_attention_layernorm, lambda: held[-1])
    settings = {"packing": packing, "per_device_train_batch_size": 1, "save_steps": 1, "max_steps": 30}
    rows = [row for row in numbered(10) if "7" not in row["messages"][1]["content"]]
    with pytest.raises(ModelError) as caught:
        run(tmp_path, model=model, rows=rows, training={"gradient_accumulation_steps": 2, **settings})
    message = str(caught.value)
    step = 1 + max((int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")), default=0)
    assert f"the loss is nan at step {step}." in message
    rows_named = message.split("The rows of its batch: ")[1].split(". First")[0].split(", ")
    assert "law.jsonl:8" in rows_named and len(rows_named) == (2 if packing else 1)
    assert "First: model.layers.1.post_attention_layernorm (Overflowing)" in message
    assert "its input and its weights are finite" in message
    assert (f"checkpoint-{step - 1} is complete" if step > 1 else "no checkpoint yet") in message
    assert not (tmp_path / "final").exists()


def test_nan_in_a_weight_is_told_from_nan_in_the_data(tmp_path: Path) -> None:
    model = chat_model()
    model.model.layers[0].self_attn.o_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"o_proj.weight \(float32\) contains NaN"):
        run(tmp_path, model=model)


def test_a_bad_gradient_names_its_weight(tmp_path: Path) -> None:
    model = chat_model()
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ModelError) as caught:
        run(tmp_path, model=model, rows=numbered(4))
    assert "the gradient's norm is inf at step 1" in str(caught.value)
    assert "the gradient of model.norm.weight (1 weights have a bad one)" in str(caught.value)
    assert "law.jsonl:4" in str(caught.value)


def test_a_healthy_forward_has_no_bad_module() -> None:
    model = chat_model()
    assert first_bad_module(model, lambda: model(input_ids=torch.arange(3, 40)[None])) is None


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ChatTrainer._save_optimizer_and_scheduler

    def full(self: Any, output_dir: str) -> None:
        if self.state.global_step == 4:
            Path(output_dir, "optimizer.pt").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, output_dir)

    monkeypatch.setattr(ChatTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(ModelError) as caught:
        run(tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir()) / 1e6
    needed = float(str(caught.value).split("takes about ")[1].split(" MB")[0])
    assert needed == pytest.approx(size, abs=0.1)
    assert "checkpoint-2 is complete" in str(caught.value) and f"the disk of {tmp_path} is full" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]


def test_signs_of_a_full_disk() -> None:
    assert is_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), False)
    failed = RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
    assert is_full(failed, short=True) and not is_full(failed, short=False)
    outer = ValueError("broken")
    outer.__cause__ = OSError(errno.EDQUOT, "quota")
    assert is_full(outer, False) and not is_full(OSError(errno.EACCES, "no"), True)
