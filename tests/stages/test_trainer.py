"""RunTrainerMixin on transformers' own Trainer: it needs no TRL."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from deepseek_v2_modeling import ModelError, collect_balance, modeling
from deepseek_v2_modeling.training.balance_log import BalanceLog, expert_shares, load_metrics
from deepseek_v2_modeling.training.checkpoints import remove_old_checkpoints
from deepseek_v2_modeling.training.mixin import RunLimits, training_arguments
from deepseek_v2_modeling.training.run_files import append_lines, cut_file

from ..helpers.models import random_ids
from ..helpers.plain_trainer import PlainTrainer, examples, make, metrics, steps
from ..helpers.stages import assert_same_weights, chat_model, lines, score_model, stopped_after

# --- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_is_task_loss_plus_balance_loss(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    batch = torch.stack([row["input_ids"] for row in examples(4)])
    with collect_balance(trainer.model) as ledger:
        task = trainer.model(input_ids=batch, labels=batch).loss
    loss = trainer.compute_loss(trainer.model, {"input_ids": batch, "labels": batch})
    assert ledger.losses[0] > 0
    torch.testing.assert_close(loss, task + ledger.losses[0])


def test_balance_loss_is_counted_once_over_micro_batches(tmp_path):
    """One batch of 4 is the same update as 4 micro-batches of 1, whose losses the Trainer sums."""
    whole = make(tmp_path / "a", max_steps=2, model=chat_model(aux_loss_alpha=0.5))
    parts = make(
        tmp_path / "b",
        max_steps=2,
        model=chat_model(aux_loss_alpha=0.5),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    whole.train()
    parts.train()
    for one, other in zip(metrics(tmp_path / "a")[:2], metrics(tmp_path / "b")[:2], strict=True):
        for key in ("loss", "grad_norm", "balance/expert", "task_loss"):
            assert one[key] == pytest.approx(other[key], rel=2e-4), key
        assert one["expert_load/layer_1/share"] == other["expert_load/layer_1/share"]


@pytest.mark.parametrize("cls", [Trainer, PlainTrainer])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_scores_are_a_mean_over_micro_batches(tmp_path, cls, num_labels):
    """A batch of 8 is the same update as 4 micro-batches of 2: the task's loss and the balance losses."""
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": i % 3 if num_labels > 1 else i / 8}
        for i, ids in enumerate(random_ids(8, 12, vocab=200))
    ]
    coefficients = {"expert": {"aux_loss_alpha": 0.5}, "none": {"aux_loss_alpha": 0.0}}
    found = {}
    for kind, alphas in coefficients.items():
        for size in (8, 2):
            model = score_model(num_labels=num_labels, **alphas)
            arguments = training_arguments(
                {
                    "per_device_train_batch_size": size,
                    "gradient_accumulation_steps": 8 // size,
                    "max_steps": 1,
                    "learning_rate": 0.0,
                    "max_grad_norm": 1e9,
                    "save_strategy": "no",
                },
                run_dir=tmp_path / f"{kind}{size}",
                seed=5,
                dtype="float32",
                limits=RunLimits(),
            )
            trainer = cls(model=model, args=TrainingArguments(**arguments), train_dataset=rows)
            trainer.train()
            found[kind, size] = next(line for line in trainer.state.log_history if "loss" in line)
        for key in ("loss", "grad_norm"):
            assert found[kind, 2][key] == pytest.approx(found[kind, 8][key], rel=2e-4), (kind, key)
    assert found["expert", 8]["loss"] > found["none", 8]["loss"] + 0.4  # alpha times 1 or more for one MoE layer


@pytest.mark.parametrize("cls", [Trainer, PlainTrainer])
@pytest.mark.parametrize("own", ["label_smoothing_factor", "compute_loss_func"])
def test_losses_that_are_made_outside_of_the_model(tmp_path, cls, own, monkeypatch):
    """They are made without the balance losses: the mixin adds them, and without it that is said."""
    said = []
    monkeypatch.setattr(modeling.logger, "warning_once", said.append)
    losses = {}
    for alpha in (0.0, 0.5):
        arguments = training_arguments(
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1, "save_strategy": "no"}
            | ({own: 0.1} if own == "label_smoothing_factor" else {}),
            run_dir=tmp_path / str(alpha),
            seed=5,
            dtype="float32",
            limits=RunLimits(),
        )
        loss = {own: lambda out, labels, num_items_in_batch: out.logits.float().square().mean() / 2}
        trainer = cls(
            model=chat_model(aux_loss_alpha=alpha),
            args=TrainingArguments(**arguments),
            train_dataset=examples(),
            **(loss if own == "compute_loss_func" else {}),
        )
        trainer.train()
        losses[alpha] = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    if cls is Trainer:
        assert losses[0.5] == pytest.approx(losses[0.0]) and "RunTrainerMixin" in said[0]
    else:
        assert losses[0.0] + 0.4 < losses[0.5] < losses[0.0] + 1.5 and not said


def test_balance_loss_moves_the_router(tmp_path):
    norms = {}
    for alpha in (0.0, 10.0):
        trainer = make(tmp_path / str(alpha), max_steps=1, model=chat_model(aux_loss_alpha=alpha))
        trainer.train()
        norms[alpha] = metrics(tmp_path / str(alpha))[0]
    assert norms[10.0]["loss"] > norms[0.0]["loss"] + 1
    assert norms[10.0]["grad_norm"] != pytest.approx(norms[0.0]["grad_norm"], rel=1e-2)
    assert "balance/total" not in norms[0.0]
    assert norms[0.0]["expert_load/max_over_mean"] >= 1


def test_evaluation_has_no_balance_loss(tmp_path):
    trainer = make(tmp_path, model=chat_model(aux_loss_alpha=100.0))
    batch = torch.stack([row["input_ids"] for row in examples(4)])
    with torch.no_grad():
        wanted = trainer.model.eval()(input_ids=batch, labels=batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-4)


# --- the log ----------------------------------------------------------------------------------------------------------


def test_log_separates_the_parts_of_the_loss(tmp_path):
    trainer = make(tmp_path, model=chat_model(aux_loss_alpha=0.1, device_aux_loss_alpha=0.2), max_steps=3)
    trainer.train()
    assert steps(tmp_path) == [1, 2, 3]
    for line in metrics(tmp_path)[:3]:
        assert line["balance/expert"] > 0 and line["balance/device"] > 0
        assert line["balance/total"] == pytest.approx(line["balance/expert"] + line["balance/device"])
        assert line["loss"] == pytest.approx(line["task_loss"] + line["balance/total"], rel=1e-5)
        assert {"epoch", "learning_rate", "grad_norm"} <= line.keys()
        share = line["expert_load/layer_1/share"]
        assert sum(share) == pytest.approx(1, abs=1e-3)
        assert line["expert_load/layer_1/max_over_mean"] == pytest.approx(max(share) * len(share), rel=1e-3)


def test_log_averages_over_the_steps_between_two_logs(tmp_path):
    make(tmp_path / "each", max_steps=2, save_steps=10).train()
    make(tmp_path / "both", max_steps=2, save_steps=10, logging_steps=2).train()
    first, second = metrics(tmp_path / "each")[:2]
    both = metrics(tmp_path / "both")[0]
    for key in ("loss", "task_loss", "balance/expert"):
        assert both[key] == pytest.approx((first[key] + second[key]) / 2, rel=1e-4), key


def test_load_metrics_of_known_counts():
    counts = torch.tensor([[4, 4, 4, 4], [12, 4, 0, 0]])
    assert expert_shares(counts)[1].tolist() == [0.75, 0.25, 0.0, 0.0]
    found = load_metrics(counts, [1, 3])
    assert found["expert_load/layer_1/max_over_mean"] == 1.0
    assert found["expert_load/layer_3/max_over_mean"] == found["expert_load/max_over_mean"] == 3.0
    assert found["expert_load/layer_3/dead"] == found["expert_load/dead"] == 2


def test_padding_has_no_part_in_the_expert_load(tmp_path):
    trainer = make(tmp_path)
    ids = random_ids(2, 8, vocab=200)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    trainer.compute_loss(trainer.model, {"input_ids": ids, "attention_mask": mask, "labels": ids})
    assert isinstance(trainer.balance_log, BalanceLog)
    counts = trainer.balance_log.counts
    assert counts is not None
    assert counts.sum().item() == int(mask.sum()) * trainer.model.config.num_experts_per_tok


# --- precision --------------------------------------------------------------------------------------------------------


def test_trainable_weights_and_their_state_are_float32(tmp_path):
    model = chat_model().to(torch.bfloat16)
    model.model.embed_tokens.weight.requires_grad_(False)
    limits = RunLimits()
    arguments = training_arguments({"max_steps": 1}, run_dir=tmp_path, seed=0, dtype="bfloat16", limits=limits)
    assert arguments["bf16"] is True
    trainer = PlainTrainer(model=model, args=TrainingArguments(**arguments), train_dataset=examples(8))
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    trainer.train()
    assert seen == [torch.bfloat16]  # computed under autocast
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    state = trainer.optimizer.state_dict()["state"]
    assert state and all(entry["exp_avg"].dtype == torch.float32 for entry in state.values())


def test_arguments_are_the_recipes_but_for_what_is_ours(tmp_path):
    found = training_arguments(
        {"logging_steps": 7, "gradient_checkpointing": True, "per_device_train_batch_size": 3},
        run_dir=tmp_path,
        seed=9,
        dtype="float32",
        limits=RunLimits(on_nan="skip"),
    )
    assert TrainingArguments(**found).gradient_checkpointing
    assert found["logging_steps"] == 7 and found["seed"] == 9 and found["bf16"] is False
    assert found["per_device_eval_batch_size"] == 3
    assert found["logging_nan_inf_filter"]
    plain = training_arguments({}, run_dir=tmp_path, seed=0, dtype="float32", limits=RunLimits())
    assert not TrainingArguments(**plain).gradient_checkpointing
    with pytest.raises(ModelError, match=r"eval_strategy is steps.*eval_data"):
        training_arguments({"eval_strategy": "steps"}, run_dir=tmp_path, seed=0, dtype="float32", limits=RunLimits())
    with pytest.raises(ModelError, match="float16"):
        training_arguments({"use_cpu": True}, run_dir=tmp_path, seed=0, dtype="float16", limits=RunLimits())


# --- checkpoints and resume -------------------------------------------------------------------------------------------


def test_resume_gives_the_same_weights_and_lines(tmp_path):
    """Experts included: their keys on disk are the hub's, which the Trainer itself cannot load."""
    straight = make(tmp_path / "a")
    straight.train()
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-2", tmp_path / "b")
    append_lines(tmp_path / "b" / "metrics.jsonl", [{"step": 4, "loss": 99.0}])
    resumed = make(tmp_path / "b", model=chat_model(seed=1))
    resumed.train(checkpoint)
    assert_same_weights(straight.model, resumed.model)
    assert steps(tmp_path / "b") == [1, 2, 3, 4]
    timing = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}


def test_resume_between_logs_gives_the_same_lines(tmp_path):
    make(tmp_path / "a", logging_steps=3, max_steps=6).train()
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-4", tmp_path / "b")
    resumed = make(tmp_path / "b", logging_steps=3, max_steps=6)
    resumed.train(checkpoint)
    assert steps(tmp_path / "a") == steps(tmp_path / "b") == [2, 3, 4, 6]
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert one.get("loss") == other.get("loss")


def test_resume_from_the_last_step_trains_no_further(tmp_path):
    done = make(tmp_path)
    done.train()
    again = make(tmp_path, model=chat_model(seed=1))
    assert again.train(tmp_path / "checkpoint-4").global_step == 4
    assert again.state.global_step == 4
    assert_same_weights(done.model, again.model)


def test_a_checkpoint_has_its_name_only_when_whole(tmp_path, monkeypatch):
    class Crashing(PlainTrainer):
        def _save_rng_state(self, output_dir):
            if self.state.global_step == 4:
                raise OSError("disk full")
            super()._save_rng_state(output_dir)

    with pytest.raises(OSError, match="disk full"):
        make(tmp_path, Crashing).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    make(tmp_path).train(tmp_path / "checkpoint-2")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-2", "checkpoint-4"]


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    for step in (1, 2, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    remove_old_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-1"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-1",
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-mine",
    }
    remove_old_checkpoints(tmp_path, None, None)
    assert (tmp_path / "checkpoint-1").exists()


def test_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = make(
        tmp_path, max_steps=4, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        learning_rate=0.5, save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in metrics(tmp_path) if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    saved = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


def test_a_fresh_start_clears_what_an_earlier_try_wrote(tmp_path):
    append_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 99.0}])
    make(tmp_path, max_steps=1).train()
    assert 99.0 not in [line.get("loss") for line in metrics(tmp_path)]


def test_lines_that_a_crash_cut_short_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_lines(path, [{"step": 1, "loss": float("nan")}, {"step": 2}])
    whole = path.stat().st_size
    append_lines(path, [{"step": 2, "of": "what came after the checkpoint"}])
    cut_file(path, whole)
    assert lines(path) == [{"step": 1, "loss": None}, {"step": 2}]
    path.write_text(path.read_text()[:-3])
    cut_file(path, whole)
    assert lines(path) == [{"step": 1, "loss": None}]
    cut_file(tmp_path / "missing.jsonl", 9)
    assert not (tmp_path / "missing.jsonl").exists()
