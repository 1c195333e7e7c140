import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conversations import render_conversation
from conversations.errors import ToolkitError
from deepseek_v2_modeling import DeepseekV2ForCausalLM
from deepseek_v2_modeling.loading import LoraSettings, load_model, prepare_trainable, resolve_source
from sft.config import SftRecipe
from sft.data import IGNORED, encode_rows
from sft.stage import train

from ..helpers.stages import (
    SECTIONS,
    TINY,
    assert_same_weights,
    assistant,
    byte_tokenizer,
    chat_model,
    conversations,
    lines,
    pairs,
    stopped_after,
    user,
)


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    """A random model does not stop by itself."""
    monkeypatch.setattr("sft.stage.SAMPLE_TOKENS", 4)


def recipe(run_dir: Path, **changes):
    training = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "max_length": 64,
        "save_steps": 2,
        **changes.pop("training", {}),
    }
    return SftRecipe(**{**SECTIONS, "stage": "sft", "output_dir": str(run_dir), "training": training, **changes})


def run(run_dir: Path, model=None, rows=None, eval_rows=None, resume_from=None, dtype="float32", **changes):
    return train(
        recipe(run_dir, model={"path": "unused", "dtype": dtype}, **changes),
        model=model or chat_model(),
        tokenizer=byte_tokenizer(),
        rows=conversations(24) if rows is None else rows,
        eval_rows=eval_rows,
        run_dir=run_dir,
        resume_from=resume_from,
    )


def final(run_dir: Path):
    return DeepseekV2ForCausalLM.from_pretrained(run_dir / "final", dtype=torch.float32)


# --- data -------------------------------------------------------------------------------------------------------------


def test_labels_are_the_assistants_words():
    tokenizer = byte_tokenizer()
    data, report, _ = encode_rows(conversations(3), tokenizer, train_on="all_assistant", max_length=64, too_long="drop")
    for row, conversation in zip(data, conversations(3), strict=True):
        rendered = render_conversation(conversation["messages"], tokenizer)
        assert row["input_ids"] == rendered["input_ids"]
        trained = [i for i in row["labels"] if i != IGNORED]
        assert tokenizer.decode(trained) == f" {conversation['messages'][1]['content']}<eos>"
    assert report.as_metrics() == {"rows": 3, "truncated": 0, "split": 0, "dropped": 0, "answer_cut_away": 0}


def test_rows_left_out_are_counted_and_told():
    rows = [*conversations(2), {"messages": user("x" * 90) + assistant("late")}, {"messages": user("no answer")}]
    _, report, _ = encode_rows(rows, byte_tokenizer(), train_on="all_assistant", max_length=64, too_long="drop")
    assert [row["row"] for row in report.rejected] == [3, 4]
    reasons = ("longer than 64 tokens", "nothing to train on")
    assert report.summary(64) == "; ".join(["4 rows", *(f"1 dropped ({reason})" for reason in reasons)])
    _, cut, _ = encode_rows(rows, byte_tokenizer(), train_on="all_assistant", max_length=64, too_long="truncate")
    assert cut.as_metrics() == {"rows": 4, "truncated": 0, "split": 0, "dropped": 2, "answer_cut_away": 1}
    assert len(cut.rejected) == 2  # the answer of the long one was cut away


def test_wrong_rows_are_refused():
    settings = {"train_on": "all_assistant", "max_length": 64, "too_long": "drop"}
    with pytest.raises(ToolkitError, match=r"row 1 is not a conversation.*dsv2 reward"):
        encode_rows(pairs(1), byte_tokenizer(), **settings)
    with pytest.raises(ToolkitError, match="no row is left"):
        encode_rows([{"messages": user("no answer")}], byte_tokenizer(), **settings)


# --- training ---------------------------------------------------------------------------------------------------------


def test_trains_and_writes_a_run(tmp_path):
    held_out = conversations(30)[24:]
    metrics = run(tmp_path, eval_rows=held_out, training={"max_steps": 6})
    log = lines(tmp_path / "metrics.jsonl")
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    assert metrics["steps"] == 6 and metrics["rows"] == 24 and metrics["seconds"] > 0
    assert metrics["eval_loss"] == [line["eval_loss"] for line in log if "eval_loss" in line][-1]
    said = lines(tmp_path / "samples.jsonl")
    assert [line["when"] for line in said] == ["before"] * 6 + ["after"] * 6
    assert [line["step"] for line in said] == [0] * 6 + [6] * 6
    assert said[0]["prompt"] == "24 + 1" and said[0]["reference"] == "25"
    assert final(tmp_path).config.use_cache
    assert (tmp_path / "final" / "tokenizer.json").is_file()
    assert not (tmp_path / "rejected.jsonl").exists()
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("training", "longest"),
    [
        ({"max_steps": 1, "per_device_train_batch_size": 1}, 8),
        ({"max_steps": 1, "per_device_train_batch_size": 24}, 15),
        ({"max_steps": 1, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}, 15),
        ({"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 24}, 29),
        ({"num_train_epochs": 9, "max_steps": -1, "per_device_train_batch_size": 24}, 30),
    ],
)
def test_samples_of_a_short_run_are_short(training: dict[str, Any], longest: int, tmp_path, monkeypatch):
    monkeypatch.setattr("sft.stage.SAMPLE_TOKENS", 30)
    monkeypatch.setattr("conversations.generation.probes.SAMPLED_SHARE", 0.25)
    model = chat_model()
    bias = torch.zeros(TINY["vocab_size"])
    bias[[1, 70]] = torch.tensor([-1e9, 1e9])  # always a letter, never an end
    model.lm_head.register_forward_hook(lambda module, inputs, out: out + bias)
    run(tmp_path, model=model, training={"save_strategy": "no", **training})
    said = lines(tmp_path / "samples.jsonl")
    assert {len(line["completion"]) for line in said} == {longest} and all(line["truncated"] for line in said)


def test_samples_end_where_chat_and_evaluation_end(tmp_path, monkeypatch):
    """At the end tokens of generation_config.json too."""
    monkeypatch.setattr("sft.stage.SAMPLE_TOKENS", 9)
    model = chat_model()
    model.generation_config.eos_token_id, model.generation_config._from_model_config = [1, 70], False
    bias = torch.full((TINY["vocab_size"],), -1e9)
    bias[70] = 0.0
    model.lm_head.register_forward_hook(lambda module, inputs, out: out + bias)
    run(tmp_path, model=model, training={"max_steps": 1, "save_strategy": "no"})
    (letter,) = {line["completion"] for line in lines(tmp_path / "samples.jsonl")}
    assert letter == byte_tokenizer().decode([70])
    assert not any(line["truncated"] for line in lines(tmp_path / "samples.jsonl"))


def test_the_loss_is_that_of_the_answers_alone(tmp_path):
    """TRL must not train on the prompt, add an end token or render anything itself."""
    model = chat_model(aux_loss_alpha=0.0)
    tokenizer, total, count = byte_tokenizer(), 0.0, 0
    rows = conversations(4)
    for row in rows:
        rendered = render_conversation(row["messages"], tokenizer)
        ids = torch.tensor([rendered["input_ids"]])
        labels = ids.masked_fill(torch.tensor([rendered["assistant_mask"]]) == 0, -100)
        items = (labels[:, 1:] != -100).sum().item()
        total += model(input_ids=ids, labels=labels).loss.item() * items
        count += items
    run(tmp_path, model=model, rows=rows, training={"max_steps": 1})
    assert lines(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_packed_rows_train_as_unpacked_ones(tmp_path):
    """One pack of all rows is one batch of all rows: documents do not see each other, no label is lost."""
    rows = conversations(4)
    settings = {"max_steps": 1, "max_length": 256, "per_device_train_batch_size": 4, "save_strategy": "no"}
    run(tmp_path / "a", rows=rows, training=settings)
    run(tmp_path / "b", rows=rows, training={**settings, "packing": True, "per_device_train_batch_size": 1})
    one, other = (lines(tmp_path / name / "metrics.jsonl")[0] for name in "ab")
    for key in ("loss", "grad_norm", "task_loss", "balance/expert"):
        assert one[key] == pytest.approx(other[key], rel=2e-3), key


def test_micro_batches_train_as_one_batch(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "no"}
    run(tmp_path / "a", training={**settings, "per_device_train_batch_size": 4})
    run(
        tmp_path / "b",
        training={**settings, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    )
    for one, other in zip(*(lines(tmp_path / name / "metrics.jsonl")[:2] for name in "ab"), strict=True):
        for key in ("loss", "grad_norm", "balance/expert"):
            assert one[key] == pytest.approx(other[key], rel=2e-3), key


def test_resume_gives_the_same_weights(tmp_path):
    run(tmp_path / "a")
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-2", tmp_path / "b")
    run(tmp_path / "b", model=chat_model(seed=1), resume_from=checkpoint)
    assert_same_weights(final(tmp_path / "a"), final(tmp_path / "b"))
    one, other = (lines(tmp_path / name / "metrics.jsonl")[:4] for name in "ab")
    assert one == other  # TRL's count of tokens included
    assert [line["when"] for line in lines(tmp_path / "b" / "samples.jsonl")] == ["before"] * 6 + ["after"] * 6


def test_resume_of_an_adapter_gives_the_same_weights(tmp_path):
    chat_model(seed=3).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    source = resolve_source(tmp_path / "base")
    lora = LoraSettings(("attention", "experts", "shared_experts"), 4, 8)

    def fresh(seed):
        torch.manual_seed(seed)
        return prepare_trainable(source, lora=lora, merge_dir=tmp_path / "merged")

    run(tmp_path / "a", model=fresh(0))
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-2", tmp_path / "b")
    run(tmp_path / "b", model=fresh(1), resume_from=checkpoint)
    found = [load_model(resolve_source(tmp_path / name)) for name in "ab"]
    assert_same_weights(*found)
    trained = {name for name, value in found[0].named_parameters() if "lora_B" in name and value.abs().sum() > 0}
    assert any("experts" in name for name in trained) and any("self_attn" in name for name in trained)


def test_plain_text_trains_beside_conversations_and_is_not_asked(tmp_path):
    rows = [{"text": f"line {i}", "origin": f"a.jsonl:{i}"} for i in range(4)] + conversations(4)
    metrics = run(tmp_path, rows=rows, training={"max_steps": 1})
    assert metrics["rows"] == 8 and metrics["dropped"] == 0
    assert {line["prompt"] for line in lines(tmp_path / "samples.jsonl")} == {"0 + 1", "1 + 1"}
    data, _, _ = encode_rows(rows[:1], byte_tokenizer(), train_on="all_assistant", max_length=64, too_long="drop")
    assert data[0]["labels"] == [IGNORED, *data[0]["input_ids"][1:]]


def test_dropped_rows_go_to_rejected(tmp_path):
    rows = [*conversations(8), {"messages": user("x" * 90) + assistant("late")}]
    metrics = run(tmp_path, rows=rows, format={"too_long": "drop"}, training={"max_steps": 1})
    assert metrics["dropped"] == 1
    assert lines(tmp_path / "rejected.jsonl") == [{"row": 9, "reason": "longer than 64 tokens"}]


def test_a_limit_of_tokens_ends_training_where_so_many_were_trained_on(tmp_path):
    free = run(tmp_path / "a", training={"max_steps": 3, "save_steps": 2})
    limited = run(tmp_path / "b", max_tokens=free["tokens"] - 1, training={"max_steps": 50, "save_steps": 2})
    assert (limited["steps"], limited["tokens"]) == (3, free["tokens"])
    checkpoint = stopped_after(tmp_path / "b" / "checkpoint-2", tmp_path / "c")
    training = {"max_steps": 50, "save_steps": 2}
    resumed = run(tmp_path / "c", max_tokens=free["tokens"], training=training, resume_from=checkpoint)
    assert (resumed["steps"], resumed["tokens"]) == (3, free["tokens"])


def test_bf16_trains_under_autocast_on_float32_weights(tmp_path):
    model = chat_model()
    metrics = run(tmp_path, model=model, rows=conversations(8), dtype="bfloat16", training={"max_steps": 2})
    assert metrics["steps"] == 2
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == "bfloat16"
