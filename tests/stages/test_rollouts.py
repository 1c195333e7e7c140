"""Rollouts of RL: from merged copies or not, within a memory budget, with logits processors; the same when resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from deepseek_v2_modeling import ModelError, apply_lora, lora_config
from deepseek_v2_modeling.adapters import copied_bytes
from deepseek_v2_modeling.inference import cache_bytes, decoding_dtype
from deepseek_v2_modeling.loading import LoraSettings, load_model, prepare_trainable, resolve_source
from deepseek_v2_modeling.training import RunLimits
from rl.config import RolloutSection
from rl.rollouts import memory
from rl.rollouts.sampled import described, plan_rollouts
from rl.stage import grpo_config, prompt_dataset
from rl.trainer import PolicyTrainer

from ..helpers.rl import Vowels, recipe, run, trainer_for
from ..helpers.stages import assert_same_weights, byte_tokenizer, chat_model, conversations, stopped_after, weights

LORA = LoraSettings(("attention", "experts"), 4, 8)
PLANNED = apply_lora(chat_model(), lora_config(("attention",), r=2))
PROMPTS = [[0, 70, 71], [0, 70, 71], [0, 72], [0, 65, 66, 67, 68]] * 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    chat_model(seed=3).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def adapted(base: Path, dtype: str = "float32") -> Any:
    """A model whose adapters do something."""
    torch.manual_seed(0)
    model = prepare_trainable(resolve_source(base), lora=LORA, merge_dir=base / "merged", dtype=dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def sampled(folder: Path, base: Path, rollout: dict[str, Any] | None = None, **training: Any) -> list[list[int]]:
    trainer = trainer_for(folder, model=adapted(base), rollout=rollout or {}, training=training)
    torch.manual_seed(5)
    answers, logps = trainer._generate_single_turn(PROMPTS, None, {}, 1)
    assert logps is None
    return answers


@pytest.mark.parametrize("training", [{}, {"top_p": 0.6, "min_p": 0.05, "repetition_penalty": 1.3, "top_k": 20}])
def test_merging_and_memory_change_no_answer(base: Path, tmp_path: Path, training: dict[str, Any]):
    wanted = sampled(tmp_path, base, {"merge": False}, max_completion_length=12, **training)
    one = cache_bytes(chat_model(), 5 + 12) / 1e9
    for rollout in ({}, {"merge": True}, {"max_cache_gb": 2.5 * one}, {"merge": False, "max_cache_gb": 1.5 * one}):
        assert sampled(tmp_path, base, rollout, max_completion_length=12, **training) == wanted
    assert len({tuple(answer) for answer in wanted}) > 4


def test_sampling_does_not_touch_the_policy(base: Path, tmp_path: Path):
    trainer = trainer_for(tmp_path, model=adapted(base), training={"beta": 0.1})
    before, mode = weights(trainer.model), trainer.model.training
    assert any(".ref." in name for name in before)
    trainer._generate_single_turn(PROMPTS, None, {}, 1)
    assert trainer.plan is not None and trainer.plan.copy and trainer.model.training is mode
    after = weights(trainer.model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_processors_are_applied_in_our_own_loop(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The best token is all that top_k 1 leaves: transformers' greedy answers, with the same penalty."""
    model, penalty = adapted(base), 1.4
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 1, "pad_token_id": 2}
    config = GenerationConfig(**greedy, repetition_penalty=penalty)
    wanted = []
    for prompt in PROMPTS[2:4]:
        ids = torch.tensor([prompt])
        wanted.append(model.eval().generate(input_ids=ids, generation_config=config)[0, len(prompt) :].tolist())
    trainer = trainer_for(tmp_path, model=model, training={"top_k": 1, "repetition_penalty": penalty, "beta": 0.0})
    monkeypatch.setattr("trl.trainer.grpo_trainer.GRPOTrainer._generate_single_turn", None)
    assert trainer._generate_single_turn(PROMPTS[2:4], None, {}, 1)[0] == wanted
    asked = {"generation_kwargs": {"no_repeat_ngram_size": 1, "do_sample": False, "max_new_tokens": 9}, "beta": 0.0}
    trainer = trainer_for(tmp_path, model=model, training=asked)
    for prompt, answer in zip(PROMPTS, trainer._generate_single_turn(PROMPTS, None, {}, 1)[0], strict=True):
        assert len(set(answer) - set(prompt)) == len(answer) <= 9


def test_what_only_generate_does_is_said_once(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer = trainer_for(tmp_path, model=adapted(base), training={"generation_kwargs": {"num_beams": 1}})
    for _ in range(2):
        answers, _ = trainer._generate_single_turn(PROMPTS[:2], None, {}, 1)
        assert all(0 < len(answer) <= 6 for answer in answers)
    said = "rl: rollouts use transformers' generate, which is slower, because of training.generation_kwargs.num_beams"
    assert capsys.readouterr().err.count(said) == 1


def test_a_budget_too_small_for_one_answer_ends_the_run(tmp_path: Path):
    with pytest.raises(ModelError, match="the cache of one answer"):
        run(tmp_path, rollout={"max_cache_gb": 1e-9})


def test_a_low_precision_policy_samples_in_float32_where_that_is_faster(base: Path, tmp_path: Path):
    low, rewards = {"path": "unused", "dtype": "bfloat16"}, [Vowels("vowels")]
    trainer = PolicyTrainer(
        adapted(base, "bfloat16"),
        grpo_config(recipe(tmp_path, model=low), tmp_path, RunLimits(), rewards),
        rewards,
        train_dataset=prompt_dataset(conversations(16)),
        processing_class=byte_tokenizer(),
        limits=RunLimits(),
    )
    trainer._generate_single_turn(PROMPTS, None, {}, 1)
    assert trainer.plan is not None and trainer.plan.copy and trainer.plan.dtype == "float32"
    assert "with the adapters merged, in float32" in described(trainer.plan)


def test_the_dtype_of_a_copy_depends_on_its_shape_and_the_cpu(monkeypatch: pytest.MonkeyPatch):
    small, low = chat_model(), torch.bfloat16
    large = chat_model(hidden_size=1024, moe_intermediate_size=512, num_hidden_layers=2)
    for slow, many in ((True, torch.float32), (False, low)):
        monkeypatch.setattr("deepseek_v2_modeling.generation.float32_is_faster", lambda _, answer=slow: answer)
        assert decoding_dtype(small, low, 2) == torch.float32 and decoding_dtype(small, low, 1000) == many
        assert decoding_dtype(small, torch.float32, 1000) is None and decoding_dtype(large, low, 1) == low


@given(
    free=st.integers(0, 10**7) | st.none(),
    merge=st.sampled_from(["auto", True, False]),
    rows=st.integers(1, 200),
    budget=st.floats(1e-6, 1e-2) | st.none(),
    low=st.booleans(),
)
def test_a_plan_follows_the_recipe_and_what_is_free(free: int | None, merge: Any, rows: int, budget: Any, low: bool):
    model, tokens = PLANNED, 40
    dtype = torch.bfloat16 if low else torch.float32
    plan = plan_rollouts(RolloutSection(merge=merge, max_cache_gb=budget), model, rows, tokens, dtype, free)
    wide = decoding_dtype(model, dtype, rows)
    assert (wide is None) is (not low)
    copied, one = copied_bytes(model, wide), cache_bytes(model, tokens, wide)
    fits = free is None or copied + min(rows, 64) * one <= RolloutSection.merged_share * free
    assert plan.copy is (merge if merge != "auto" else fits)
    assert plan.dtype == (str(wide).removeprefix("torch.") if plan.copy and wide else None)
    if budget is not None:
        assert plan.cache_bytes == int(budget * 1e9)
    elif free is None:
        assert plan.cache_bytes is None
    else:
        least = cache_bytes(model, tokens, wide if plan.copy else None)
        assert plan.cache_bytes is not None and least <= plan.cache_bytes <= max(free, least)


def test_a_resumed_run_keeps_the_plan_of_its_start(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Less memory is free after the restart: the same answers side by side all the same, and the same weights."""
    whole = tmp_path / "whole"
    run(whole, model=adapted(base))
    checkpoint = stopped_after(whole / "checkpoint-2", tmp_path / "parts")
    monkeypatch.setattr("rl.rollouts.sampled.free_bytes", lambda device: 1)
    run(tmp_path / "parts", model=adapted(base), resume_from=checkpoint)
    assert_same_weights(*(load_model(resolve_source(folder)) for folder in (whole, tmp_path / "parts")))


def test_free_memory_is_the_least_of_system_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert memory.free_bytes(cpu) is None
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert memory.free_bytes(cpu) == 4000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert memory.free_bytes(cpu) == 2_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(cpu) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(cpu) == 1000 * 1024


@pytest.mark.parametrize("rollout", [{"merge": "yes"}, {"merge": 1}, {"max_cache_gb": 0}, {"max_cache": 3}])
def test_the_section_refuses_what_it_does_not_know(rollout: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match="rollout"):
        recipe(tmp_path, rollout=rollout)
    assert json.dumps(recipe(tmp_path).model_dump()["rollout"]) == '{"merge": "auto", "max_cache_gb": null}'
