import copy
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from conversations import render_conversation, verify
from conversations.errors import ToolkitError
from conversations.rewards.base import Reward
from conversations.rewards.model import RewardModelReward
from conversations.rewards.rule import RuleReward
from deepseek_v2_modeling import DeepseekV2ForCausalLM
from deepseek_v2_modeling.inference import end_tokens
from deepseek_v2_modeling.loading import LoraSettings, load_model, prepare_trainable, resolve_source
from rl.rollouts.groups import SampledAnswers, judge_answers
from rl.stage import planned_config, prompt_dataset, rehearsal
from rl.trainer import PATIENCE

from ..helpers.rl import Vowels, recipe, run, trainer_for, untimed
from ..helpers.stages import (
    TINY,
    assert_same_weights,
    byte_tokenizer,
    chat_model,
    conversations,
    lines,
    pairs,
    score_model,
    stopped_after,
    user,
    weights,
)


class Length(Reward):
    def judge(self, answers):
        return [float(len(answer.text)) for answer in answers]


class Ended(Reward):
    def judge(self, answers):
        return [float(answer.finished) for answer in answers]


class Silent(Reward):
    def judge(self, answers):
        return [None] * len(answers)


def test_a_limit_of_tokens_counts_each_pass_over_an_answer(tmp_path):
    """Two updates on each rollout: its tokens are trained on twice."""
    training = {"num_iterations": 2, "steps_per_generation": 1}
    limited = run(tmp_path, max_tokens=1, training=training)
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert limited["steps"] == len(log) == 1 and limited["tokens"] == 2 * log[0]["num_tokens"]


def final(run_dir: Path):
    return DeepseekV2ForCausalLM.from_pretrained(run_dir / "final", dtype=torch.float32)


def adapter_run(folder: Path) -> Path:
    """A directory with an adapter that does something, as an SFT run leaves it."""
    chat_model(seed=3).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    model = prepare_trainable(resolve_source(folder / "base"), lora=LORA, merge_dir=folder / "merged")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder / "sft"))
    byte_tokenizer().save_pretrained(folder / "sft")
    return folder / "sft"


LORA = LoraSettings(("attention", "experts"), 4, 8)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_trains_and_writes_a_run(tmp_path):
    helpful = RewardModelReward("helpful", score_model().eval(), byte_tokenizer(), weight=0.5)
    rewards = [Vowels("vowels"), helpful, RuleReward("number", weight=2.0)]
    metrics = run(tmp_path, rewards=rewards)
    assert metrics["steps"] == 4 and metrics["seconds"] > 0 and "kl" in metrics
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert metrics["tokens"] == log[-1]["num_tokens"] > log[0]["num_tokens"] > 0
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    for line in log:
        parts = [line[f"rewards/{reward.name}/mean"] * reward.weight for reward in rewards]
        assert line["reward"] == pytest.approx(sum(parts), abs=1e-4)
        assert line["balance/expert"] > 0 and line["expert_load/max_over_mean"] >= 1
    said = lines(tmp_path / "samples.jsonl")
    assert [line["step"] for line in said] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    assert set(said[0]["rewards"]) == {"vowels", "helpful", "number"}
    for line in said:
        question = [{"role": "user", "content": line["prompt"].removeprefix("User: ")}]
        reference = str(int(question[0]["content"].split()[0]) + 1)
        verdict = verify("number", line["completion"], prompt=question, reference=reference)
        assert line["reasons"] == {"number": verdict.reason} and line["rewards"]["number"] == verdict.score
        assert isinstance(line["truncated"], bool)
    assert said[0]["prompt"].endswith("+ 1")
    assert final(tmp_path).config.use_cache
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "README.md").exists()


def test_the_length_penalty_counts_the_tokens_that_were_sampled(tmp_path):
    penalty = RuleReward("length", settings={"max_tokens": 8, "buffer": 8})
    run(tmp_path, rewards=[Vowels("vowels"), penalty], training={"max_completion_length": 8, "max_steps": 2})
    said = lines(tmp_path / "samples.jsonl")
    assert said
    for line in said:
        tokens = len(line["completion"]) + (not line["truncated"])  # at least: a token is a byte, and the end is one
        assert line["rewards"]["length"] <= 1 - min(tokens, 8) / 8
        assert (line["rewards"]["length"] == 0) == (line["reasons"]["length"].startswith("8 tokens"))
        assert not line["truncated"] or line["rewards"]["length"] == 0


def test_samples_hold_what_was_said_with_its_rewards_and_advantage(tmp_path):
    """A group is one prompt's answers, and of four all are written."""
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "beta": 0.0, "save_strategy": "no"}
    run(tmp_path, rewards=[Vowels("vowels"), Length("length", weight=-0.5)], training=settings)
    said = lines(tmp_path / "samples.jsonl")
    assert [line["step"] for line in said] == [1] * 4 + [2] * 4
    for group in (said[:4], said[4:]):
        assert len({line["prompt"] for line in group}) == 1 and len({line["completion"] for line in group}) > 1
        for line in group:
            assert "reasons" not in line
            vowels, length = sum(letter in "aeiouAEIOU" for letter in line["completion"]), len(line["completion"])
            assert line["rewards"] == {"vowels": vowels, "length": length}
        values = torch.tensor([line["rewards"]["vowels"] - 0.5 * line["rewards"]["length"] for line in group])
        wanted = (values - values.mean()) / (values.std() + 1e-4)
        assert [line["advantage"] for line in group] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_long_runs_write_samples_of_some_steps(tmp_path, monkeypatch):
    """Of the first, the last, and every so many between."""
    monkeypatch.setattr("rl.trainer.SAMPLED_STEPS", 3)
    settings = {"per_device_train_batch_size": 4, "max_steps": 7, "max_completion_length": 1, "beta": 0.0}
    run(tmp_path, training={**settings, "save_strategy": "no"})
    assert sorted({line["step"] for line in lines(tmp_path / "samples.jsonl")}) == [1, 2, 4, 6, 7]


def test_rewards_are_told_which_answers_ended_by_themselves(tmp_path):
    trainer = trainer_for(tmp_path, rewards=[Ended("ended")])
    end = byte_tokenizer().eos_token_id
    ids = [[70, end], [70, 71], [], [end]]
    completions = [[{"role": "assistant", "content": "a"}] for _ in ids]
    rows = [{"prompt": user("1 + 1"), "reference": None} for _ in ids]
    sampled = SampledAnswers([[]] * len(ids), ids, completions)
    trainer.answers = judge_answers(trainer.rewards, rows, sampled, trainer.eos_token_ids)
    values = trainer._calculate_rewards(rows, [row["prompt"] for row in rows], completions, ids)
    assert values[:, 0].tolist() == [1, 0, 0, 1] and trainer.unwritten


def test_balance_loss_is_counted_once_over_micro_batches(tmp_path):
    """GRPO scales its own loss: ours must be divided, whatever the number of micro-batches."""
    model = chat_model(aux_loss_alpha=50.0)
    settings = {"max_steps": 1, "beta": 0.0, "save_strategy": "no"}
    parts = {**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    run(tmp_path / "a", model=copy.deepcopy(model), training={**settings, "per_device_train_batch_size": 8})
    run(tmp_path / "b", model=model, training=parts)
    one, other = (lines(tmp_path / name / "metrics.jsonl")[0] for name in "ab")
    assert one["balance/total"] == pytest.approx(other["balance/total"], rel=2e-2)
    assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)  # nearly all of it is balance loss
    assert one["loss"] > 10


def test_reward_goes_up(tmp_path):
    run(tmp_path, training={"max_steps": 20, "beta": 0.0, "learning_rate": 2e-2, "save_strategy": "no"})
    rewards = [line["reward"] for line in lines(tmp_path / "metrics.jsonl") if "reward" in line]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 1


def test_prompts_are_rendered_by_our_template(tmp_path):
    trainer = trainer_for(tmp_path)
    prompts = [user("1 + 1")] * 3 + [user("2 + 2")]
    ids, images, rest = trainer._tokenize_prompts(prompts)
    tokenizer = byte_tokenizer()
    assert ids == [render_conversation(p, tokenizer, add_generation_prompt=True)["input_ids"] for p in prompts]
    assert images is None and rest == {}


@pytest.mark.parametrize(
    "more", [{}, {"top_k": 300}, {"generation_kwargs": {"num_beams": 1}}], ids=["ours", "cut", "TRL's"]
)
@pytest.mark.parametrize(
    ("stated", "of_a_file", "ends"),
    [([1, 70, 71, 999], True, [1, 70, 71]), (70, True, [1, 70]), (70, False, [1]), (None, True, [1])],
)
def test_rollouts_end_where_chat_and_evaluation_end(tmp_path, more, stated, of_a_file, ends):
    """At the tokenizer's end token and those of generation_config.json (999 is no token), not at config.json's."""
    model = chat_model()
    model.generation_config.eos_token_id = stated
    model.generation_config._from_model_config = not of_a_file
    trainer = trainer_for(tmp_path, model=model, training={**more, "max_completion_length": 40})
    assert trainer.eos_token_ids == ends == end_tokens(model, byte_tokenizer())
    answers, others = answers_with(trainer, ends), {70, 71, 72} - set(ends)
    assert {answer[-1] for answer in answers} == {ends[-1]} and {x for a in answers for x in a[:-1]} == others


def answers_with(trainer, ends):
    """Answers of the last of these ends and of 70, 71 and 72, the other ends being rare."""
    others = sorted({70, 71, 72} - set(ends))
    bias = torch.full((TINY["vocab_size"],), -1e9)
    bias[others] = -math.log(len(others))
    bias[ends] = torch.tensor([-1.0 - 9.0 * (end != ends[-1]) for end in ends])
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, out: out * 0 + bias)
    return trainer._generate_single_turn([[0, 70, 71]] * 8, None, {}, 1)[0]


def test_rollouts_end_where_the_recipe_says(tmp_path):
    training = {"generation_kwargs": {"eos_token_id": 73}, "max_completion_length": 40}
    answers = answers_with(trainer_for(tmp_path, training=training), [1, 73])
    assert {answer[-1] for answer in answers} == {73} and {x for a in answers for x in a[:-1]} == {70, 71, 72}


# --- the reference ----------------------------------------------------------------------------------------------------


def test_kl_begins_at_zero_and_grows(tmp_path):
    """Reference and policy are the same at first: the same class, weights and type of computation."""
    run(tmp_path, training={"max_steps": 3})
    kl = [line["kl"] for line in lines(tmp_path / "metrics.jsonl") if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[-1] > 1e-4


def test_reference_is_a_frozen_copy_of_the_start(tmp_path):
    model = chat_model()
    start = weights(model)
    trainer = trainer_for(tmp_path, model=model, training={"max_steps": 2})
    assert type(trainer.ref_model) is DeepseekV2ForCausalLM
    trainer.train()
    assert all(torch.equal(start[name], value) for name, value in weights(trainer.ref_model).items())
    assert any(not torch.equal(start[name], value) for name, value in weights(model).items())
    assert not any(p.requires_grad for p in trainer.ref_model.parameters()) and not trainer.ref_model.training
    assert trainer.args.beta == trainer.beta == 0.1


def test_no_reference_without_kl(tmp_path):
    assert trainer_for(tmp_path, training={"beta": 0.0}).ref_model is None


def test_reference_can_follow_the_policy(tmp_path):
    model = chat_model()
    settings = {"max_steps": 2, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = trainer_for(tmp_path, model=model, training=settings)
    trainer.train()
    assert_same_weights(trainer.ref_model, model)


def test_reference_of_an_adapter_is_its_start_and_is_not_saved(tmp_path):
    source = resolve_source(adapter_run(tmp_path))
    model = prepare_trainable(source, lora=LORA, merge_dir=tmp_path / "merged")
    assert isinstance(model, PeftModel)
    start = {n: v for n, v in weights(model).items() if ".default." in n}
    run(tmp_path / "rl", model=model, training={"max_steps": 3})
    kl = [line["kl"] for line in lines(tmp_path / "rl" / "metrics.jsonl") if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[-1] > 1e-5
    now = weights(model)
    for name, value in start.items():
        assert torch.equal(now[name.replace(".default.", ".ref.")], value), name
    assert any(not torch.equal(now[name], value) for name, value in start.items())
    names = sorted(path.name for path in (tmp_path / "rl" / "final").iterdir())
    assert "adapter_model.safetensors" in names and "ref" not in names
    ids = torch.tensor([[0, 70, 71, 72]])
    loaded = load_model(resolve_source(tmp_path / "rl"))
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 3}, {"num_iterations": 4}])
def test_resume_gives_the_same_weights(tmp_path, settings):
    """Also from a checkpoint between two updates on the same completions."""
    run(tmp_path / "a", training=settings)
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-2", tmp_path / "b")
    run(tmp_path / "b", training=settings, resume_from=checkpoint)
    assert_same_weights(final(tmp_path / "a"), final(tmp_path / "b"))
    one, other = (lines(tmp_path / name / "metrics.jsonl")[:4] for name in "ab")
    for before, after in zip(one, other, strict=True):
        assert untimed(before) == untimed(after)
    said = lines(tmp_path / "a" / "samples.jsonl")
    assert said == lines(tmp_path / "b" / "samples.jsonl")
    rollouts = {"steps_per_generation": {1, 4}, "num_iterations": {1}}
    assert {line["step"] for line in said} == next((rollouts[key] for key in settings), {1, 2, 3, 4})


def test_resume_of_an_adapter_keeps_its_reference(tmp_path):
    source = resolve_source(adapter_run(tmp_path))

    def fresh():
        return prepare_trainable(source, lora=LORA, merge_dir=tmp_path / "merged")

    run(tmp_path / "a", model=fresh())
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-2", tmp_path / "b")
    run(tmp_path / "b", model=fresh(), resume_from=checkpoint)
    assert_same_weights(*(load_model(resolve_source(tmp_path / name)) for name in "ab"))
    one, other = (lines(tmp_path / name / "metrics.jsonl")[:4] for name in "ab")
    assert [line["kl"] for line in one] == [line["kl"] for line in other]


# --- rewards that say nothing -----------------------------------------------------------------------------------------


def test_a_reward_that_is_none_for_all_stops_the_run(tmp_path):
    with pytest.raises(ToolkitError, match=r"no reward gave a score for any of 8 completions \(step 1\)"):
        run(tmp_path, rewards=[Silent("silent")])


def test_a_reward_that_never_speaks_beside_others_stops_the_run(tmp_path):
    with pytest.raises(ToolkitError, match=f"silent gave no score.*first {PATIENCE} batches"):
        run(tmp_path, rewards=[Vowels("vowels"), Silent("silent")], training={"max_steps": PATIENCE + 1})


def test_a_reward_may_be_silent_for_a_while(tmp_path):
    trainer = trainer_for(tmp_path, rewards=[Vowels("vowels"), Silent("rare")])
    nothing, something = torch.tensor([[1.0, torch.nan]]), torch.tensor([[1.0, 0.0]])
    trainer._require_scores(nothing)
    trainer._require_scores(something)
    for _ in range(3 * PATIENCE):
        trainer._require_scores(nothing)


def test_a_rule_without_references_stops_before_the_first_step(tmp_path):
    rows = [{"messages": user("hello")}] * 4
    with pytest.raises(ToolkitError, match="number needs a reference"):
        run(tmp_path, rows=rows, rewards=[Vowels("vowels"), RuleReward("number")])


def test_the_toy_run_of_a_check_is_the_recipes_own(tmp_path):
    training = {"per_device_train_batch_size": 2, "num_generations": 2, "max_steps": 1, "learning_rate": 0.25}
    asked = recipe(tmp_path, training=training, max_tokens=7)
    planned = planned_config(asked)
    assert planned.learning_rate == 0.25 and planned.reward_weights == [1.0] and Path(planned.output_dir) == tmp_path
    trainer = rehearsal(asked, chat_model(), byte_tokenizer(), tmp_path)
    assert [row["prompt"] for row in trainer.train_dataset] == [user("a")] * 2
    assert trainer.args.learning_rate == 0.25
    assert trainer.train().global_step == 1


def test_prompts_come_from_any_canonical_row():
    data = prompt_dataset([*conversations(1), *pairs(1)])
    assert data[0] == {"prompt": user("0 + 1"), "reference": "1", "number": 0}
    assert data[1] == {"prompt": user("ask 0"), "reference": None, "number": 1}
    with pytest.raises(ToolkitError, match="no prompts"):
        prompt_dataset([])
    with pytest.raises(ToolkitError, match="row 1 has no question"):
        prompt_dataset([{"messages": [{"role": "assistant", "content": "hello"}]}])
