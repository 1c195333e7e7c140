import json
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conversations.answers.judging import judge, means, means_by_kind
from conversations.errors import ToolkitError
from conversations.rendering.answer_fitting import cut
from conversations.rendering.conversation import render_conversation
from conversations.rendering.lengths import LengthReport
from deepseek_v2_modeling import DeepseekV2ForSequenceClassification
from deepseek_v2_modeling.inference import pad_batch, token_losses
from deepseek_v2_modeling.loading import LoraSettings, load_model, prepare_trainable, resolve_source
from reward.config import RewardRecipe
from reward.data import answer_ids, encode_judged, encode_pairs, encoder
from reward.stage import planned_config, rehearsal, train
from reward.trainers import JudgedCollator, next_answer_tokens, pointwise_loss, prefix_loss

from ..helpers.stages import (
    SECTIONS,
    assert_same_weights,
    assistant,
    byte_tokenizer,
    chat_model,
    lines,
    pairs,
    score_model,
    stopped_after,
    user,
)


def judged(n, verdict="label"):
    """Answers with a verdict: gladly is right, no is wrong."""
    rows = []
    for i in range(n):
        good = i % 2 == 0
        value = good if verdict == "label" else (3.0 if good else -1.0)
        rows.append(
            {"prompt": user(f"ask {i}"), "completion": assistant("yes, gladly" if good else "no"), verdict: value}
        )
    return rows


def run(run_dir: Path, model=None, rows=None, eval_rows=None, resume_from=None, lm_head=None, **changes):
    training = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "max_length": 64,
        "save_steps": 4,
        **changes.pop("training", {}),
    }
    sections = {**SECTIONS, "stage": "reward", "output_dir": str(run_dir), "training": training, **changes}
    return train(
        RewardRecipe(**sections),
        model=model or score_model(),
        tokenizer=byte_tokenizer(),
        rows=pairs(32) if rows is None else rows,
        eval_rows=eval_rows,
        run_dir=run_dir,
        resume_from=resume_from,
        lm_head=lm_head,
    )


def test_what_a_recipe_refuses_is_what_its_loss_cannot_train_on():
    sections = {**SECTIONS, "stage": "reward", "output_dir": "o"}
    pair, label, number = pairs(1)[0], judged(1)[0], judged(1, "score")[0]
    refuse = RewardRecipe(**sections, loss="pairwise").refusal()
    assert refuse(pair) is None and "not a pair of chosen and rejected" in refuse(label)
    refuse = RewardRecipe(**sections, loss="pointwise").refusal()
    assert refuse(label) is None and "not an answer with a label or a score" in refuse(pair)
    assert "train on one kind at a time" in refuse(number)


@pytest.mark.parametrize(("too_long", "left", "truncated"), [("drop", 0, 0), ("truncate", 1, 1)])
def test_what_check_measures_of_a_row_is_both_of_its_answers(too_long, left, truncated):
    sections = {**SECTIONS, "stage": "reward", "output_dir": "o", "format": {"too_long": too_long}}
    report, row = LengthReport(), pairs(1)[0]
    pieces = encoder(RewardRecipe(**sections), byte_tokenizer(), 20)(row, report)
    whole = [len(answer_ids(row["prompt"], row[key], byte_tokenizer(), None)) for key in ("chosen", "rejected")]
    assert report.rows == 1 and list(report.lengths) == [max(whole)] and max(whole) > 20
    assert len(pieces) == left and report.truncated == truncated and len(report.rejected) == 1 - left
    if left:
        assert [len(ids) for ids, mask in pieces[0]] == [min(20, size) for size in whole]
        assert all(mask == [0] * len(ids) for ids, mask in pieces[0])


@pytest.mark.parametrize(
    "how", [{"loss": "pairwise"}, {"loss": "pointwise"}, {"sft_coefficient": 1.0, "prefix_coefficient": 1.0}]
)
def test_the_toy_run_of_a_check_is_the_recipes_own(tmp_path, how):
    training = {"per_device_train_batch_size": 1, "max_steps": 1, "learning_rate": 0.25, "max_length": 64}
    sections = {**SECTIONS, "stage": "reward", "output_dir": str(tmp_path), "training": training, **how}
    trainer = rehearsal(RewardRecipe(**sections), score_model(), byte_tokenizer(), tmp_path)
    assert trainer.args.learning_rate == 0.25 and len(trainer.train_dataset) == 2
    assert trainer.train().global_step == 1


def final(run_dir: Path):
    return DeepseekV2ForSequenceClassification.from_pretrained(run_dir / "final", dtype=torch.float32).eval()


def score(model, prompt, answer):
    ids = torch.tensor([answer_ids(prompt, answer, byte_tokenizer(), None)])
    return model(input_ids=ids).logits.item()


def test_learns_to_rank_pairs(tmp_path):
    wrong = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(43)[40:]]
    held_out = [*pairs(40)[32:], *({**row, "meta": {"kind": "turned"}} for row in wrong)]
    metrics = run(tmp_path, eval_rows=held_out)
    assert metrics["n"] == 11 and metrics["pair_accuracy"] == pytest.approx(8 / 11)
    assert metrics["by_kind"]["turned"] == {"pair_accuracy": 0.0, "n": 3}
    assert metrics["by_kind"]["even"] == {"pair_accuracy": 1.0, "n": 4}
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["accuracy"] == 1.0
    for line in log:
        assert line["balance/expert"] > 0
        assert line["loss"] == pytest.approx(line["task_loss"] + line["balance/total"], rel=1e-5)


def test_statistics_come_from_training_pairs_only(tmp_path):
    rows, held_out = pairs(6), [{**pairs(1)[0], "chosen": assistant("z" * 40)}] * 20
    metrics = run(tmp_path, rows=rows, eval_rows=held_out, training={"max_steps": 2})
    stats = json.loads((tmp_path / "final" / "reward_stats.json").read_text())
    model = final(tmp_path)
    scores = [score(model, row["prompt"], row[key]) for row in rows for key in ("chosen", "rejected")]
    assert stats["n"] == 12 and stats == metrics["reward_stats"]
    assert stats["mean"] == pytest.approx(statistics.fmean(scores), abs=1e-4)
    assert stats["std"] == pytest.approx(statistics.pstdev(scores), abs=1e-4)


def test_starts_from_an_sft_adapter(tmp_path):
    chat_model(seed=3).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    lora = LoraSettings(("attention", "experts"), 4, 8)
    base = resolve_source(tmp_path / "base")
    sft = prepare_trainable(base, lora=lora, merge_dir=tmp_path / "merged")
    sft.save_pretrained(str(tmp_path / "sft"))
    source = resolve_source(tmp_path / "sft")
    model = prepare_trainable(source, lora=lora, head="score", merge_dir=tmp_path / "merged")
    metrics = run(tmp_path / "rm", model=model, eval_rows=pairs(40)[32:])
    assert metrics["pair_accuracy"] == 1.0
    loaded = load_model(resolve_source(tmp_path / "rm"), head="score")
    row = pairs(1)[0]
    assert score(loaded, row["prompt"], row["chosen"]) > score(loaded, row["prompt"], row["rejected"])


def test_resume_gives_the_same_weights(tmp_path):
    run(tmp_path / "a")
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-4", tmp_path / "b")
    run(tmp_path / "b", model=score_model(seed=1), resume_from=checkpoint)
    assert_same_weights(final(tmp_path / "a"), final(tmp_path / "b"))
    assert lines(tmp_path / "a" / "metrics.jsonl")[:8] == lines(tmp_path / "b" / "metrics.jsonl")[:8]


def test_micro_batches_train_as_one_batch(tmp_path):
    """Here the Trainer divides by the number of micro-batches: the balance loss must not be divided twice."""
    settings = {"max_steps": 2, "save_strategy": "no"}
    run(tmp_path / "a", training={**settings, "per_device_train_batch_size": 4})
    parts = {**settings, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run(tmp_path / "b", training=parts)
    for one, other in zip(*(lines(tmp_path / name / "metrics.jsonl")[:2] for name in "ab"), strict=True):
        for key in ("loss", "grad_norm", "balance/expert", "task_loss"):
            assert one[key] == pytest.approx(other[key], rel=2e-3), key


@pytest.mark.parametrize(("verdict", "measure"), [("label", "accuracy"), ("score", "mse")])
def test_learns_from_judged_answers(tmp_path, verdict, measure):
    settings = {"max_steps": 40, "save_strategy": "no", "learning_rate": 3e-2, "per_device_train_batch_size": 8}
    rows, held_out = judged(32, verdict), judged(40, verdict)[32:]
    metrics = run(tmp_path, rows=rows, eval_rows=held_out, loss="pointwise", training=settings)
    assert metrics["n"] == 8
    assert metrics[measure] == 1.0 if verdict == "label" else metrics[measure] < 0.5
    assert metrics["reward_stats"]["n"] == 32
    assert [line for line in lines(tmp_path / "metrics.jsonl") if "balance/total" in line]


@pytest.mark.parametrize("verdict", ["label", "score"])
def test_what_the_first_step_logs(tmp_path, verdict):
    """Loss, mean score and accuracy of the model as it came, over a batch of rows of different lengths."""
    rows = judged(4, verdict)
    rows[1] = {**rows[1], "completion": assistant("no, not at all")}
    model = score_model()
    scores = torch.tensor([score(model.eval(), row["prompt"], row["completion"]) for row in rows])
    targets = torch.tensor([float(row[verdict]) for row in rows])
    settings = {"max_steps": 1, "save_strategy": "no", "learning_rate": 1e-9}
    metrics = run(tmp_path, model=model.train(), rows=rows, loss="pointwise", training=settings)
    logged = lines(tmp_path / "metrics.jsonl")[0]
    assert logged["task_loss"] == pytest.approx(pointwise_loss(scores, targets, verdict).item(), rel=1e-4)
    assert logged["mean_reward"] == pytest.approx(scores.mean().item(), abs=1e-4)
    right = sum((s > 0) == bool(t > 0) for s, t in zip(scores.tolist(), targets.tolist(), strict=True)) / 4
    assert logged.get("accuracy") == (right if verdict == "label" else None)
    assert 0 < right < 1
    assert metrics["reward_stats"]["mean"] == pytest.approx(scores.mean().item(), abs=1e-4)


def test_pairs_are_scored_without_padding(tmp_path):
    """A batch of answers of different lengths: the first step's figures are those of each answer alone."""
    answers = ["a", "bb" * 9, "c" * 4, "d" * 13]
    rows = [{**row, "chosen": assistant(answer)} for row, answer in zip(pairs(4), answers, strict=True)]
    model, read = score_model().eval(), []
    keys = ("chosen", "rejected")
    good, bad = (torch.tensor([score(model, row["prompt"], row[key]) for row in rows]) for key in keys)
    model.model.embed_tokens.register_forward_hook(lambda module, given, out: read.append(given[0].numel()))
    settings = {"max_steps": 1, "save_strategy": "no", "learning_rate": 1e-9}
    run(tmp_path, model=model.train(), rows=rows, training=settings)
    logged = lines(tmp_path / "metrics.jsonl")[0]
    centred = 0.01 * (good + bad).square().mean()
    ranked = -torch.nn.functional.logsigmoid(good - bad).mean()
    assert logged["task_loss"] == pytest.approx((ranked + centred).item(), rel=1e-4)
    assert logged["margin"] == pytest.approx((good - bad).mean().item(), abs=1e-4)
    assert logged["accuracy"] == (good > bad).float().mean().item()
    lengths = [len(answer_ids(row["prompt"], row[key], byte_tokenizer(), None)) for row in rows for key in keys]
    assert read[0] == sum(lengths) < len(lengths) * max(lengths) and logged["num_tokens"] == sum(lengths)


def scores_of_prefixes(model, ids):
    return [model(input_ids=torch.tensor([ids[: end + 1]])).logits.item() for end in range(len(ids))]


def test_what_stands_beside_the_pairwise_loss(tmp_path):
    """The first step's figures, over answers of different lengths: the chat model's loss on the chosen ones, and the
    pair-wise loss of every two prefixes from where the answers differ. The head of the chat model is left as it is."""
    answers = ["a", "not at all", "c" * 4, "d" * 13]
    rows = [{**row, "chosen": assistant(answer)} for row, answer in zip(pairs(4), answers, strict=True)]
    model, chat, tokenizer = score_model().eval(), chat_model(seed=5).eval(), byte_tokenizer()
    chat.model.load_state_dict(model.model.state_dict())
    head = chat.lm_head.weight.detach().clone()
    ids = [[answer_ids(row["prompt"], row[key], tokenizer, None) for key in ("chosen", "rejected")] for row in rows]
    masks = [render_conversation(row["prompt"] + row["chosen"], tokenizer)["assistant_mask"] for row in rows]
    nats = [loss for loss, _ in token_losses(chat, [good for good, _ in ids], masks, pad_token_id=2)]
    losses = []
    for good, bad in ids:
        first = next(i for i, (one, other) in enumerate(zip(good, bad, strict=False)) if one != other)
        margins = [a - b for a, b in zip(scores_of_prefixes(model, good), scores_of_prefixes(model, bad), strict=False)]
        losses.append(-torch.nn.functional.logsigmoid(torch.tensor(margins[first:])).mean().item())
    settings = {"max_steps": 1, "save_strategy": "no", "learning_rate": 1e-9, "eval_strategy": "steps", "eval_steps": 1}
    extras = {"sft_coefficient": 0.5, "prefix_coefficient": 3.0, "lm_head": chat.lm_head.requires_grad_(False)}
    run(tmp_path / "a", model=model.train(), rows=rows, eval_rows=rows, training=settings, **extras)
    run(tmp_path / "b", model=model.train(), rows=rows, training={**settings, "eval_strategy": "no"})
    logged, held_out, plain = [*lines(tmp_path / "a" / "metrics.jsonl")[:2], lines(tmp_path / "b" / "metrics.jsonl")[0]]
    assert logged["sft_loss"] == pytest.approx(sum(nats) / sum(map(sum, masks)), rel=1e-4)
    assert logged["prefix_loss"] == pytest.approx(statistics.fmean(losses), rel=1e-4)
    whole = plain["task_loss"] + 0.5 * logged["sft_loss"] + 3 * logged["prefix_loss"]
    assert logged["task_loss"] == pytest.approx(whole, rel=1e-4)
    assert held_out["eval_loss"] == pytest.approx(whole, rel=1e-4) and held_out["eval_sft_loss"] > 0
    assert logged["accuracy"] == plain["accuracy"] and "sft_loss" not in plain
    assert torch.equal(chat.lm_head.weight, head)


@pytest.mark.parametrize("lora", [None, {"targets": ["attention"], "r": 2}])
def test_what_stands_beside_the_pairwise_loss_trains(tmp_path, lora):
    """A reward model of random weights learns to say the chosen answer."""
    chat_model(seed=3).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    source = resolve_source(tmp_path / "base")
    adapters = LoraSettings(("attention", "experts"), 4, 8) if lora else None
    model = prepare_trainable(source, lora=adapters, head="score", merge_dir=tmp_path / "merged")
    head = load_model(source).get_output_embeddings()
    run(tmp_path / "rm", model=model, lm_head=head, sft_coefficient=1.0, prefix_coefficient=1.0)
    log = [line for line in lines(tmp_path / "rm" / "metrics.jsonl") if "sft_loss" in line]
    assert log[-1]["sft_loss"] < log[0]["sft_loss"] and log[-1]["prefix_loss"] < log[0]["prefix_loss"]


def test_tokens_that_are_predicted_and_pairs_that_are_equal():
    ids, mask = pad_batch([[5, 6, 7, 8], [5, 9], [5, 6, 7], [5, 9]], 2, left=False)
    labels = next_answer_tokens(ids, mask, torch.tensor([2, 9]))  # the second was cut to less than its answer
    assert labels.tolist() == [[-100, 7, 8, -100, 9, -100, *[-100] * 5]]
    scores = torch.arange(16.0).reshape(4, 4).requires_grad_()
    loss = prefix_loss(scores, ids, mask)  # one answer goes on where the other ends; two are the same
    assert loss.item() == 0.0


@pytest.mark.parametrize("name", ["sft_coefficient", "prefix_coefficient", "center_rewards_coefficient"])
def test_single_answers_have_nothing_beside_their_loss(name):
    asked = {"training": {name: 0.5}} if name.startswith("center") else {name: 0.5}
    with pytest.raises(ValueError, match=f"{name} is for loss: pairwise"):
        RewardRecipe.model_validate({**SECTIONS, "stage": "reward", "output_dir": "o", "loss": "pointwise", **asked})


@pytest.mark.parametrize(("stated", "used"), [({}, 0.01), (0, 0), (None, None), (0.5, 0.5)])
def test_scores_are_centred_unless_the_recipe_says_otherwise(tmp_path, stated, used):
    training = {} if stated == {} else {"center_rewards_coefficient": stated}
    recipe = RewardRecipe(**{**SECTIONS, "stage": "reward", "output_dir": "o", "training": training})
    assert planned_config(recipe).center_rewards_coefficient == used


def test_statistics_are_of_a_seeded_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("reward.stage.STATS_ROWS", 3)
    rows = [{**row, "chosen": assistant("y" * (1 + i))} for i, row in enumerate(pairs(12))]
    settings = {"max_steps": 1, "save_strategy": "no", "learning_rate": 1e-9}
    found = [run(tmp_path / str(i), rows=rows, seed=seed, training=settings) for i, seed in enumerate((0, 0, 1))]
    first, again, other = (metrics["reward_stats"] for metrics in found)
    assert first == again and first["mean"] != other["mean"] and first["n"] == other["n"] == 6


def test_rows_left_out_are_written_once(tmp_path):
    """And not again by a run that resumes."""
    long = {**pairs(1)[0], "prompt": user("x" * 100)}
    settings = {"max_steps": 2, "save_steps": 1}
    metrics = run(tmp_path / "a", rows=[*pairs(8), long], training=settings, format={"too_long": "drop"})
    rejected = [{"row": 9, "reason": "longer than 64 tokens"}]
    assert lines(tmp_path / "a" / "rejected.jsonl") == rejected and metrics["dropped"] == 1
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-1", tmp_path / "b")
    run(tmp_path / "b", rows=[*pairs(8), long], training=settings, format={"too_long": "drop"}, resume_from=checkpoint)
    assert lines(tmp_path / "b" / "rejected.jsonl") == rejected


def test_margins_are_between_the_scores(tmp_path):
    """A missing one is 0; the loss of every prefix has them too."""
    rows = [{**row, **({} if i == 1 else {"margin": i - 1.5})} for i, row in enumerate(pairs(4))]
    rows[2] = {**rows[2], "chosen": assistant("certainly, here it is")}
    model, tokenizer = score_model().eval(), byte_tokenizer()
    wanted = torch.tensor([row.get("margin", 0.0) for row in rows])
    ids = [[answer_ids(row["prompt"], row[key], tokenizer, None) for key in ("chosen", "rejected")] for row in rows]
    good, bad = torch.tensor([[scores_of_prefixes(model, one)[-1] for one in pair] for pair in ids]).unbind(1)
    ranked = -torch.nn.functional.logsigmoid(good - bad - wanted).mean().item()
    settings = {"max_steps": 1, "save_strategy": "no", "learning_rate": 1e-9, "eval_strategy": "steps", "eval_steps": 1}
    settings["center_rewards_coefficient"] = None
    run(tmp_path / "a", model=model.train(), rows=rows, eval_rows=rows, training=settings)
    logged, held_out = lines(tmp_path / "a" / "metrics.jsonl")[:2]
    assert logged["task_loss"] == pytest.approx(ranked, rel=1e-4)
    assert held_out["eval_loss"] == pytest.approx(ranked, rel=1e-4)
    assert logged["margin"] == pytest.approx((good - bad).mean().item(), abs=1e-4)  # of scores, as TRL logs it
    settings["eval_strategy"] = "no"
    run(tmp_path / "b", model=model.train(), rows=rows, training=settings, prefix_coefficient=1.0)
    model.eval()
    losses = []
    for (one, other), margin in zip(ids, wanted, strict=True):
        first = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        scores = zip(scores_of_prefixes(model, one), scores_of_prefixes(model, other), strict=False)
        between = torch.tensor([a - b for a, b in scores][first:]) - margin
        losses.append(-torch.nn.functional.logsigmoid(between).mean().item())
    logged = lines(tmp_path / "b" / "metrics.jsonl")[0]
    assert logged["prefix_loss"] == pytest.approx(statistics.fmean(losses), rel=1e-4)


def test_an_answer_that_was_cut_has_no_end_token():
    tokenizer, limit = byte_tokenizer(), 64
    end = tokenizer.eos_token_id
    row = {**pairs(1)[0], "chosen": assistant("yes, " * 30)}
    whole = answer_ids(row["prompt"], row["chosen"], tokenizer, None)
    asked = len(render_conversation(row["prompt"], tokenizer, add_generation_prompt=True)["input_ids"])
    data, report, _ = encode_pairs([row], tokenizer, max_length=limit, too_long="truncate")
    assert end in data[0]["rejected_ids"][-1:] and end not in data[0]["chosen_ids"][1:]
    assert len(data[0]["chosen_ids"]) == limit and report.truncated == 1
    assert data[0]["chosen_ids"] == whole[asked - limit // 4 :][:limit]
    assert data[0]["answer_tokens"] == limit - limit // 4
    assert answer_ids(row["prompt"], row["chosen"], tokenizer, limit) == data[0]["chosen_ids"]
    single = {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
    judged_data, report, _ = encode_judged([single], tokenizer, max_length=limit, too_long="truncate")
    assert judged_data[0]["input_ids"] == data[0]["chosen_ids"] and report.truncated == 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))
def test_what_a_cut_leaves_of_a_conversation(asked, answered, limit):
    """All of a short one; of a long one as many tokens as may be, its answer's end only where the answer is whole."""
    tokens = list(range(asked + answered))
    left = cut(tokens, asked, limit)
    assert len(left) == min(limit, len(tokens)) and left == list(range(left[0], left[-1] + 1))
    before = sum(token < asked for token in left)
    whole = left[-1] == tokens[-1]
    assert whole or before == min(asked, limit // 4)
    assert before >= min(asked, limit // 4)


def test_answers_that_a_cut_leaves_equal_are_left_out():
    row = {**pairs(1)[0], "chosen": assistant("y" * 80 + "a"), "rejected": assistant("y" * 80 + "b")}
    _, report, _ = encode_pairs([row, *pairs(1)], byte_tokenizer(), max_length=64, too_long="truncate")
    assert report.rejected == [{"row": 1, "reason": "two answers that are equal when cut to 64 tokens"}]


def test_long_rows_are_measured_as_they_are_trained(tmp_path):
    """Without their prompt's beginning: the score is read at the end."""
    rows = [{**row, "prompt": user(f"{i} " + "x" * 100)} for i, row in enumerate(pairs(4))]
    settings = {"max_steps": 1, "save_strategy": "no", "learning_rate": 1e-9}
    metrics = run(tmp_path, rows=rows, training=settings, format={"too_long": "truncate"})
    model = final(tmp_path)
    ids = [answer_ids(row["prompt"], row[key], byte_tokenizer(), 64) for row in rows for key in ("chosen", "rejected")]
    scores = [model(input_ids=torch.tensor([i])).logits.item() for i in ids]
    assert {len(i) for i in ids} == {64} and metrics["truncated"] == 4
    assert metrics["reward_stats"]["mean"] == pytest.approx(statistics.fmean(scores), abs=1e-4)


def test_pointwise_losses():
    scores, targets = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])
    softplus = torch.nn.functional.softplus(-scores).mean()
    torch.testing.assert_close(pointwise_loss(scores, targets, "label"), softplus)
    torch.testing.assert_close(pointwise_loss(scores, targets, "score"), torch.tensor(1.0))


def test_judged_batches_are_padded_on_the_right():
    batch = JudgedCollator(2)([{"input_ids": [5, 6, 7], "target": 1.0}, {"input_ids": [8], "target": 0.0}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["target"].tolist() == [1.0, 0.0]


def test_long_rows_lose_their_beginning_or_are_left_out():
    tokenizer, row = byte_tokenizer(), {**pairs(1)[0], "prompt": user("x" * 100)}
    data, report, _ = encode_pairs([row], tokenizer, max_length=20, too_long="truncate")
    whole = answer_ids(row["prompt"], row["chosen"], tokenizer, None)
    assert data[0]["chosen_ids"] == whole[-20:] and report.truncated == 1
    _, report, _ = encode_pairs([row, pairs(1)[0]], tokenizer, max_length=64, too_long="drop")
    assert report.rejected == [{"row": 1, "reason": "longer than 64 tokens"}]
    with pytest.raises(ToolkitError, match="split is for conversations"):
        encode_pairs([row], tokenizer, max_length=20, too_long="split")
    with pytest.raises(ToolkitError, match="no row is left"):
        encode_pairs([row], tokenizer, max_length=20, too_long="drop")


def test_rows_of_the_wrong_kind_are_refused():
    tokenizer, settings = byte_tokenizer(), {"max_length": 64, "too_long": "drop"}
    with pytest.raises(ToolkitError, match=r"row 2 is not a pair.*pointwise"):
        encode_pairs([*pairs(1), *judged(1)], tokenizer, **settings)
    with pytest.raises(ToolkitError, match="row 1 is not a judged answer"):
        encode_judged(pairs(1), tokenizer, **settings)
    with pytest.raises(ToolkitError, match="some rows have a label and some a score"):
        encode_judged([*judged(1), *judged(1, "score")], tokenizer, **settings)


def test_judging_with_known_scores():
    rows = [*pairs(2), *judged(2), *judged(1, "score")]
    known = {"yes, gladly": 2.0, "no": 0.0}
    verdicts = judge(lambda asked: [known[answer[0]["content"]] for _, answer in asked], rows)
    assert [v.value for v in verdicts] == [1.0, 1.0, 1.0, 1.0, 1.0]
    assert means(verdicts[:2]) == {"pair_accuracy": 1.0, "n": 2}
    tied = judge(lambda asked: [0.0] * len(asked), rows)
    assert [v.value for v in tied] == [0.0, 0.0, 0.0, 1.0, 9.0]
    kinds = means_by_kind(rows, verdicts)
    assert kinds["even"] == {"pair_accuracy": 1.0, "n": 1}
    assert kinds["other"] == {"accuracy": 1.0, "mse": 1.0, "n": 3}
