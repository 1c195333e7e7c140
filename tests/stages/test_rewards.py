import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conversations import render_conversation
from conversations.answers.reward_stats import RewardStats
from conversations.errors import ToolkitError
from conversations.rewards.base import Answer, Reward
from conversations.rewards.entry import RewardEntry
from conversations.rewards.model import RewardModelReward, normalised
from conversations.rewards.rule import RuleReward
from conversations.rewards.terms import check_references, model_reward
from conversations.stage import OtherModel

from ..helpers.stages import assistant, byte_tokenizer, score_model, user


def call(reward, prompts, answers, **columns):
    return reward([user(p) for p in prompts], [assistant(" " + a) for a in answers], **columns)


class Broken(Reward):
    def judge(self, answers):
        raise RuntimeError("no server")


class Fixed(Reward):
    def __init__(self, values, on_error="error"):
        super().__init__("fixed", on_error=on_error)
        self.values = values

    def judge(self, answers):
        return self.values


def test_number_rule_compares_with_the_reference():
    values = call(RuleReward("number"), ["3 + 4", "3 + 4", "hello"], ["It is 7.", "8", "7"], reference=["7", "7", None])
    assert values == [1.0, 0.0, None]


def test_math_rule():
    assert call(RuleReward("math"), ["half?", "half?"], ["$\\frac{1}{2}$", "2"], reference=["0.5", "0.5"]) == [1.0, 0.0]


def test_language_and_format_rules_need_no_reference():
    prompts = ["What is it?", "这是什么？"]
    assert call(RuleReward("language"), prompts, ["A cat.", "A cat."]) == [1.0, 0.0]
    assert call(RuleReward("format"), prompts, ["A cat.", "A cat."], finished=[True, False]) == [1.0, 0.0]
    assert call(RuleReward("format"), prompts, ["A cat.", ""]) == [1.0, 0.0]


def test_a_rule_is_handed_the_number_of_tokens_of_a_completion():
    penalty = RuleReward("length", settings={"max_tokens": 4, "buffer": 2})
    ids = [[5], [5, 6], [5, 6, 7], [5, 6, 7, 8]]
    assert call(penalty, ["?"] * 4, ["a"] * 4, completion_ids=ids) == [1.0, 1.0, 0.5, 0.0]
    assert call(penalty, ["?"], ["a"]) == [None]


def test_unknown_rule_names_the_known_ones():
    with pytest.raises(ToolkitError, match="number"):
        RuleReward("nmber")


@pytest.mark.parametrize(("on_error", "value"), [("zero", 0.0), ("skip", None)])
def test_failures_by_policy(on_error, value):
    assert call(Broken("broken", on_error=on_error), ["a", "b"], ["c", "d"]) == [value, value]
    assert call(Fixed([1.0, math.nan, math.inf], on_error), ["a"] * 3, ["b"] * 3) == [1.0, value, value]
    bad = RuleReward("number", on_error=on_error)
    assert call(bad, ["a", "b"], ["7", "7"], reference=["many", "7"]) == [value, 1.0]


def test_failures_stop_the_run_otherwise():
    with pytest.raises(ToolkitError, match="broken failed: no server"):
        call(Broken("broken"), ["a"], ["b"])
    with pytest.raises(ToolkitError, match="no finite value"):
        call(Fixed([math.nan]), ["a"], ["b"])
    with pytest.raises(ToolkitError, match="many"):
        call(RuleReward("number"), ["a"], ["7"], reference=["many"])


def test_none_is_kept_whatever_the_policy():
    """None says that the reward does not apply; it is no failure."""
    assert call(Fixed([None, 2.0], "zero"), ["a"] * 2, ["b"] * 2) == [None, 2.0]


@given(st.floats(-1e6, 1e6), st.floats(-10, 10), st.floats(0.01, 10), st.floats(0.1, 5))
def test_normalised_scores(score, mean, std, clip):
    stats = RewardStats(mean, std, 10)
    assert normalised(score, None, None) == score
    assert normalised(mean, stats, None) == 0
    assert normalised(mean + std, stats, None) == pytest.approx(1, abs=1e-6)
    assert -clip <= normalised(score, stats, clip) <= clip
    assert math.isnan(normalised(math.nan, stats, clip))


def test_scores_without_spread_stay_finite():
    assert math.isfinite(normalised(3.0, RewardStats(2.0, 0.0, 1), None))


def test_stats_are_read_from_the_final_directory(tmp_path):
    with pytest.raises(ToolkitError, match="reward_stats"):
        RewardStats.read(tmp_path)
    (tmp_path / "reward_stats.json").write_text(json.dumps({"mean": 1.5, "std": 2.0, "n": 7}))
    assert RewardStats.read(tmp_path) == RewardStats(1.5, 2.0, 7)
    for std in (0.0, 0.25):
        (tmp_path / "reward_stats.json").write_text(json.dumps({"mean": -1, "std": std, "n": 7}))
        assert RewardStats.read(tmp_path) == RewardStats(-1.0, std, 7)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting"),
        ("[]", "list indices"),
        ('{"mean": 1}', "'std'"),
        ('{"mean": "x", "std": 1, "n": 1}', "could not convert"),
        ('{"mean": 1, "std": -0.1, "n": 1}', "mean is 1.0 and std -0.1"),
        ('{"mean": NaN, "std": 1, "n": 1}', "mean is nan and std 1.0"),
        ('{"mean": 1, "std": Infinity, "n": 1}', "mean is 1.0 and std inf"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, text, why):
    (tmp_path / "reward_stats.json").write_text(text)
    with pytest.raises(ToolkitError, match=rf"reward_stats\.json: .*{why}.*train the reward model again"):
        RewardStats.read(tmp_path)


def test_reward_model_scores_the_rendered_conversation():
    tokenizer, model = byte_tokenizer(), score_model().eval()
    reward = RewardModelReward("helpful", model, tokenizer, stats=RewardStats(0.5, 2.0, 9), batch_size=2)
    prompts, answers = ["a", "a longer question", "b"], ["yes", "", "no, never"]
    values = call(reward, prompts, answers)
    for prompt, answer, value in zip(prompts, answers, values, strict=True):
        ids = render_conversation(user(prompt) + assistant(answer), tokenizer)["input_ids"]
        score = model(input_ids=torch.tensor([ids])).logits.item()
        assert value == pytest.approx((score - 0.5) / 2.0, abs=1e-5)
    assert not model.training


def test_reward_model_scores_equal_answers_once():
    model, seen = score_model().eval(), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    reward = RewardModelReward("helpful", model, byte_tokenizer())
    values = call(reward, ["a", "a", "b", "a"], ["yes", "no", "yes", "yes"])
    said = [user(prompt) + assistant(answer) for prompt, answer in (("a", "yes"), ("a", "no"), ("b", "yes"))]
    assert seen == [sum(len(render_conversation(turns, byte_tokenizer())["input_ids"]) for turns in said)]
    assert values[0] == values[3] and len(set(values)) == 3


def test_a_reward_model_scores_nothing_beyond_its_positions():
    tokenizer = byte_tokenizer()
    longest = len(render_conversation(user("a") + assistant("a long answer"), tokenizer)["input_ids"])
    rewards = [
        RewardModelReward("helpful", score_model(max_position_embeddings=positions).eval(), tokenizer)
        for positions in (longest, longest - 1)
    ]
    assert None not in call(rewards[0], ["a", "a"], ["yes", "a long answer"])
    with pytest.raises(
        ToolkitError, match=f"{longest} tokens is longer than the {longest - 1} positions of the reward"
    ):
        call(rewards[1], ["a", "a"], ["yes", "a long answer"])


def test_a_cut_answer_is_scored_without_an_end_token():
    tokenizer, model = byte_tokenizer(), score_model().eval()
    reward = RewardModelReward("helpful", model, tokenizer)
    values = call(reward, ["a", "a", "b"], ["yes", "yes", "no"], finished=[True, False, False])
    for value, prompt, answer, finished in zip(values, "aab", ("yes", "yes", "no"), (True, False, False), strict=True):
        ids = render_conversation(user(prompt) + assistant(answer), tokenizer)["input_ids"]
        ids = ids if finished else ids[:-1]
        assert (ids[-1] == tokenizer.eos_token_id) is finished
        mask = torch.ones(1, len(ids))
        assert value == pytest.approx(model(torch.tensor([ids]), attention_mask=mask).logits.item(), abs=1e-5)
    assert values[0] != values[1]


@pytest.mark.parametrize("on_error", ["zero", "skip"])
def test_rules_say_why_and_others_why_they_failed(on_error):
    rule = RuleReward("number", on_error=on_error)
    assert call(rule, ["a"] * 3, ["7", "8", "7"], reference=["7", "7", "many"])[:2] == [1.0, 0.0]
    assert all(rule.reasons) and len(rule.reasons) == len(set(rule.reasons)) == 3 and "many" in rule.reasons[2]
    call(rule, ["a"], ["7"], reference=["7"])
    assert len(rule.reasons) == 1
    broken = Broken("broken", on_error=on_error)
    call(broken, ["a"], ["7"])
    assert broken.reasons == ["the reward broken failed: no server"]


def test_reward_model_clips():
    reward = RewardModelReward("helpful", score_model().eval(), byte_tokenizer(), clip=1e-3)
    assert all(abs(value) <= 1e-3 for value in call(reward, ["a", "b"], ["c", "d"]))


def test_a_model_of_a_recipe_is_normalised_by_its_own_statistics():
    stats = RewardStats(0.5, 2.0, 9)
    other = OtherModel("helpful", score_model().eval(), byte_tokenizer(), stats=stats)
    entry = RewardEntry(model="helpful", clip=3.0, weight=0.25, on_error="skip")
    reward = model_reward(entry, other)
    assert (reward.stats, reward.clip, reward.weight, reward.on_error) == (stats, 3.0, 0.25, "skip")


def test_rewards_tell_trl_their_name():
    assert RuleReward("number", weight=0.5).__name__ == "number"


def test_references_must_be_there_for_a_rule_that_needs_them():
    rules = [RuleReward("format"), RuleReward("number")]
    check_references(rules, [{"reference": None}, {"reference": "7"}])
    check_references(rules[:1], [{}])
    with pytest.raises(ToolkitError, match=r"number needs a reference.*2 rows"):
        check_references(rules, [{"reference": None}, {}])


def test_answers_are_finished_unless_said_otherwise():
    assert Answer(user("a"), "b").finished
