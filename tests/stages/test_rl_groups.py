"""Groups whose answers all have one reward: left out of the update to the same weights, or replaced."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conversations.answers.prompts import prompt_text
from conversations.errors import ToolkitError
from conversations.rewards.base import Reward
from rl.rollouts.groups import OtherPrompts, equal_groups, left_out
from rl.rollouts.judged import JudgedRollouts

from ..helpers.rl import VowelsOfSome, run, trainer_for, untimed
from ..helpers.stages import assert_same_weights, chat_model, conversations, lines, stopped_after

NAN = float("nan")


class OneReward(Reward):
    def judge(self, answers):
        return [0.3] * len(answers)


def weighted(values, weights, size):
    return equal_groups(torch.tensor(values), torch.tensor(weights), size).tolist()


def test_a_group_is_equal_by_its_weighted_sum_and_without_unscored_answers():
    assert weighted([[1.0, 2.0], [3.0, 1.0], [1.0, 2.0], [1.0, 2.0]], [1.0, 2.0], 2) == [True, True]
    assert weighted([[1.0, 2.0], [3.0, 2.0], [0.1, NAN], [NAN, 0.1]], [1.0, 1.0], 2) == [False, True]
    assert weighted([[NAN, NAN], [3.0, 2.0], [NAN, NAN], [NAN, NAN]], [1.0, 1.0], 2) == [True, True]
    assert weighted([[1.0], [NAN], [2.0]], [1.0], 3) == [False]


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 5), st.randoms())
def test_all_equal_answers_but_one_of_an_empty_micro_batch_are_left_out(equal, micro, rng):
    lengths = torch.tensor([rng.randint(0, 9) for _ in equal])
    out = left_out(torch.tensor(equal), lengths, micro).tolist()
    assert not any(o and not e for o, e in zip(out, equal, strict=True))
    for start in range(0, len(equal), micro):
        part = slice(start, start + micro)
        kept = [start + i for i, o in enumerate(out[part]) if not o]
        assert kept and (sum(equal[part]) == sum(out[part]) or (len(kept) == 1 and all(equal[part])))
        if all(equal[part]):
            assert lengths[kept[0]] == min(lengths[part])


@given(st.integers(1, 12), st.lists(st.integers(0, 5), max_size=12), st.integers(0, 9))
def test_other_prompts_are_others_while_there_are_any_and_resume(rows, asked, stop):
    data = [{"prompt": [{"role": "user", "content": str(i)}]} for i in range(rows)]
    stream, taken = OtherPrompts(data, 3), {"0"}
    drawn = []
    for i, count in enumerate(asked):
        if i == stop:
            resumed = OtherPrompts(data, 3)
            resumed.drawn = stream.drawn
            stream = resumed
        before = set(taken)
        found = stream.replacements(range(count), taken)
        texts = [prompt_text(row["prompt"]) for row in found.values()]
        assert len(found) == min(count, rows - len(before)) and len({*texts} - before) == len(texts)
        assert taken == before | {*texts}
        drawn += texts
    straight, taken = OtherPrompts(data, 3), {"0"}
    assert drawn == [
        prompt_text(row["prompt"]) for n in asked for row in straight.replacements(range(n), taken).values()
    ]


def test_every_turn_has_an_order_of_its_own():
    stream = OtherPrompts([{"prompt": [{"role": "user", "content": str(i)}]} for i in range(20)], 3)
    turns = [[prompt_text(row["prompt"]) for row in stream.replacements(range(20), set()).values()] for _ in range(3)]
    assert len({*map(tuple, turns)}) == 3 and all(sorted(turn) == sorted(turns[0]) for turn in turns)


SIX = {"per_device_train_batch_size": 6, "num_generations": 3}
LEAVING = {"beta": 0.0, "save_strategy": "no", "max_steps": 3}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"loss_type": "grpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"loss_type": "dr_grpo", "num_iterations": 2, "per_device_train_batch_size": 2, "steps_per_generation": 4},
    ],
    ids=["dapo", "micro-batches", "several updates"],
)
def test_weights_are_those_of_not_leaving_out(tmp_path, monkeypatch, more):
    model = chat_model(aux_loss_alpha=0.0)
    read = []
    real = type(model.model).forward

    def counting(self, input_ids, **rest):
        read.append(input_ids.numel() if not self.config.use_cache or self.training else 0)
        return real(self, input_ids, **rest)

    monkeypatch.setattr(type(model.model), "forward", counting)
    models = {}
    for leaves_out in (True, False):
        monkeypatch.setattr(JudgedRollouts, "leaves_out_equal_groups", leaves_out)
        models[leaves_out] = copy.deepcopy(model)
        read.clear()
        run(tmp_path / str(leaves_out), model=models[leaves_out], rewards=[VowelsOfSome("v")], training=LEAVING | more)
        models[f"read {leaves_out}"] = sum(read)
    logs = [[x for x in lines(tmp_path / str(on) / "metrics.jsonl") if "loss" in x] for on in (True, False)]
    assert sum(line["groups/left_out"] for line in logs[0] if "groups/left_out" in line) > 0
    assert models["read True"] < models["read False"]
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4, abs=1e-9)
    for (name, value), other in zip(models[True].named_parameters(), models[False].parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=0, msg=name)


def test_without_anything_to_learn_nothing_moves_and_all_is_logged(tmp_path):
    """The mean of three times 0.3 is not 0.3: TRL would train on the rounding error."""
    model = chat_model(aux_loss_alpha=0.0)
    start = copy.deepcopy(model)
    run(tmp_path, model=model, rewards=[OneReward("one")], training=LEAVING | SIX)
    assert_same_weights(model, start)
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [(line["groups/left_out"], line["loss"], line["grad_norm"]) for line in log] == [(2, 0, 0)] * 3


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ({}, {"beta": 0.1}),
        ({"aux_loss_alpha": 0.01}, {}),
        ({}, {"loss_type": "bnpo"}),
        ({}, {"entropy_coef": 0.1}),
        ({}, {"top_entropy_quantile": 0.5}),
        ({}, {"multi_objective_aggregation": "normalize_then_sum"}),
    ],
    ids=lambda part: "-".join(part) or "plain",
)
def test_nothing_is_left_out_that_the_loss_needs(tmp_path, model, training):
    trainer = trainer_for(tmp_path, model=chat_model(**{"aux_loss_alpha": 0.0, **model}), training=LEAVING | training)
    assert not trainer.leaves_out_equal_groups


@pytest.mark.parametrize(("aggregation", "equal"), [("sum_then_normalize", True), ("normalize_then_sum", False)])
def test_groups_are_equal_in_each_reward_where_each_is_normalised_alone(tmp_path, aggregation, equal):
    """As in GDPO: totals of (1, 0) and (0, 2) with weights 1 and 0.5 are one, their advantages are not."""
    training = {"beta": 0.0, "multi_objective_aggregation": aggregation}
    trainer = trainer_for(tmp_path, rewards=[OneReward("one"), OneReward("two", weight=0.5)], training=training)
    apart = [[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
    answers = [SimpleNamespace(values=values) for values in [*apart, *[[1.0, NAN]] * 4]]
    assert trainer._equal(answers).tolist() == [equal, True]


# --- other prompts instead --------------------------------------------------------------------------------------------


def groups_of(trainer, monkeypatch):
    """[(prompt, its answers)] of each batch that TRL is given."""
    seen = []
    real = type(trainer)._calculate_rewards

    def spy(self, inputs, prompts, completions, ids):
        seen.append([prompt_text(prompt) for prompt in prompts])
        return real(self, inputs, prompts, completions, ids)

    monkeypatch.setattr(type(trainer), "_calculate_rewards", spy)
    return seen


def test_equal_groups_are_replaced_by_other_prompts(tmp_path, monkeypatch):
    sampling = {"max_rounds": 8}
    trainer = trainer_for(tmp_path, rewards=[VowelsOfSome("vowels")], training=LEAVING, dynamic_sampling=sampling)
    seen = groups_of(trainer, monkeypatch)
    trainer.train()
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert sum(line["dynamic_sampling/replaced"] for line in log) > 0
    assert all(line["dynamic_sampling/still_equal"] == 0 == line["frac_reward_zero_std"] for line in log)
    for prompts, line in zip(seen, log, strict=True):
        assert prompts == [prompt for prompt in prompts[::4] for _ in range(4)] and len(set(prompts)) == 2
        assert all(int(prompt.split()[0]) % 2 for prompt in prompts)
        assert 0 <= line["dynamic_sampling/rounds"] <= 8
    for line in lines(tmp_path / "samples.jsonl"):
        assert int(line["prompt"].split()[0]) % 2
        assert line["rewards"]["vowels"] == sum(c in "aeiouAEIOU" for c in line["completion"])


def test_rounds_end_and_what_is_left_is_counted(tmp_path):
    run(tmp_path, rewards=[OneReward("one")], training=LEAVING, dynamic_sampling={"max_rounds": 2})
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    figures = [[line[f"dynamic_sampling/{name}"] for name in ("rounds", "replaced", "still_equal")] for line in log]
    assert figures == [[2, 4, 2]] * 3


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}])
def test_resume_draws_the_same_prompts(tmp_path, settings):
    more = {"rewards": [VowelsOfSome("vowels")], "dynamic_sampling": {"max_rounds": 3}}
    training = {"beta": 0.0, "max_steps": 6, "save_steps": 3, **settings}
    run(tmp_path / "a", training=training, **more)
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-3", tmp_path / "b")
    run(tmp_path / "b", training=training, resume_from=checkpoint, **more)
    one, other = ([untimed(x) for x in lines(tmp_path / name / "metrics.jsonl")[:6]] for name in "ab")
    assert one == other and sum(line.get("dynamic_sampling/replaced", 0) for line in one[3:]) > 0
    assert lines(tmp_path / "a" / "samples.jsonl") == lines(tmp_path / "b" / "samples.jsonl")


def test_as_many_prompts_as_a_rollout_takes_have_no_others(tmp_path):
    with pytest.raises(ToolkitError, match="dynamic_sampling: each rollout takes all 2 prompts"):
        run(tmp_path, rows=conversations(2), dynamic_sampling={"max_rounds": 1})


def test_processes_that_share_an_engine_do_not_redraw(tmp_path):
    trainer = trainer_for(tmp_path, training=LEAVING, dynamic_sampling={"max_rounds": 1})
    trainer.check_dynamic_sampling()
    trainer.args.use_vllm, trainer.accelerator = True, SimpleNamespace(num_processes=2)
    with pytest.raises(ToolkitError, match="needs a single process"):
        trainer.check_dynamic_sampling()
