"""A curriculum by pass rate: prompts are drawn as often as their weights say, and all of it resumes."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conversations.answers.prompts import prompt_text
from conversations.errors import ToolkitError
from conversations.rewards.rule import RuleReward
from rl.rollouts.curriculum import LEAST, CurriculumPrompts, prompt_weights

from ..helpers.rl import Vowels, recipe, run, trainer_for, untimed
from ..helpers.stages import conversations, lines, stopped_after

NAN = math.nan
TRAINING = {"beta": 0.0, "save_strategy": "no", "max_steps": 3}
CURRICULUM = {"by": "pass_rate", "target": 0.5}


def prompts(rates, target=0.5, seed=3):
    rows = [{"prompt": [{"role": "user", "content": str(i)}], "number": i} for i in range(len(rates))]
    stream = CurriculumPrompts(rows, seed, target)
    stream.rates = torch.tensor(rates, dtype=torch.float64)
    return stream


@given(st.lists(st.one_of(st.just(NAN), st.floats(0, 1)), min_size=1, max_size=9), st.floats(0.05, 0.95))
def test_weights_fall_with_the_distance_from_the_target(rates, target):
    weights = prompt_weights(torch.tensor(rates, dtype=torch.float64), target).tolist()
    assert all(LEAST - 1e-9 <= weight <= 1 for weight in weights)
    for rate, weight in zip(rates, weights, strict=True):
        wanted = 1 if math.isnan(rate) else 1 - (1 - LEAST) * abs(rate - target) / max(target, 1 - target)
        assert weight == pytest.approx(wanted)
    far = prompt_weights(torch.tensor([0.0 if target >= 0.5 else 1.0, target], dtype=torch.float64), target)
    assert far.tolist() == pytest.approx([LEAST, 1.0])


@pytest.mark.parametrize("target", [0.5, 0.2])
def test_prompts_are_drawn_as_often_as_their_weights_say(target):
    """Chi-square of 20,000 draws of one against the weights, and of the second of two against what is then left."""
    stream, draws = prompts([0.0, 0.1, 0.5, 0.75, 1.0, NAN], target), 20_000
    weights = prompt_weights(stream.rates, target)
    shares = weights / weights.sum()
    pairs = [tuple(row["number"] for row in stream.draw(2)) for _ in range(draws)]
    first = torch.tensor([count for _, count in sorted(Counter(one for one, _ in pairs).items())])
    assert float(((first - draws * shares) ** 2 / (draws * shares)).sum()) < 20.5  # 0.1 % at 5 degrees of freedom
    second = {
        (one, two): shares[one] * weights[two] / (weights.sum() - weights[one])
        for one in range(6)
        for two in range(6)
        if one != two
    }
    found = Counter(pairs)
    assert found.keys() <= second.keys()
    chi = sum((found[pair] - draws * share) ** 2 / (draws * share) for pair, share in second.items())
    assert float(chi) < 58.3  # 0.1 % at 29


def test_a_rate_is_the_newest_answers_and_what_was_known():
    stream = prompts([NAN, NAN, 1.0])
    stream.learn([(0, True), (0, False), (2, False), (2, False)])
    assert stream.rates.tolist()[::2] == [0.5, 0.5] and math.isnan(stream.rates[1])
    stream.learn([(0, True), (0, True)])
    assert stream.rates[0] == 0.75
    figures = stream.figures()
    assert figures == {"seen": 2.0, "effective_prompts": pytest.approx(2.8017, abs=1e-3), "pass_rate": 0.5}


@given(st.lists(st.integers(1, 4), max_size=6), st.integers(0, 6))
def test_draws_resume(counts, stop):
    def play(resumed):
        stream, drawn = prompts([NAN] * 6), []
        for turn, count in enumerate(counts):
            if resumed and turn == stop:
                state = stream.state()
                stream = prompts([NAN] * 6)
                stream.restore(state)
            rows = stream.draw(count)
            found = stream.replacements(range(2), {prompt_text(row["prompt"]) for row in rows})
            drawn += [*rows, *found.values()]
            assert len({row["number"] for row in (*rows, *found.values())}) == count + len(found)
            stream.learn([(row["number"], row["number"] % 2 == 0) for row in rows])
        return drawn

    assert play(False) == play(True)


# --- in a run ---------------------------------------------------------------------------------------------------------


def asked(trainer, monkeypatch):
    """The prompts of each rollout."""
    seen = []
    real = type(trainer)._calculate_rewards

    def spy(self, inputs, prompts, completions, ids):
        seen.append([prompt_text(prompt) for prompt in prompts])
        return real(self, inputs, prompts, completions, ids)

    monkeypatch.setattr(type(trainer), "_calculate_rewards", spy)
    return seen


class Even(RuleReward):
    """Right for prompts with an even number, half of the time for others."""

    def judge(self, answers):
        return [float(int(prompt_text(a.prompt).split()[0]) % 2 == 0 or i % 2) for i, a in enumerate(answers)]


def test_a_run_learns_pass_rates_and_draws_by_them(tmp_path, monkeypatch):
    training = TRAINING | {"max_steps": 30, "learning_rate": 0.0, "max_completion_length": 2}
    trainer = trainer_for(tmp_path, rewards=[Even("number")], training=training, curriculum=CURRICULUM)
    seen = asked(trainer, monkeypatch)
    trainer.train()
    for prompts_of in seen:
        assert prompts_of == [prompt for prompt in prompts_of[::4] for _ in range(4)] and len(set(prompts_of)) == 2
    rates = trainer.other_prompts.rates.tolist()
    assert all(math.isnan(rate) or rate == (1.0 if number % 2 == 0 else 0.5) for number, rate in enumerate(rates))
    late = [int(prompt.split()[0]) for prompts_of in seen[12:] for prompt in prompts_of[::4]]
    assert sum(number % 2 for number in late) > 0.8 * len(late)
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert log[-1]["curriculum/seen"] == sum(not math.isnan(rate) for rate in rates) <= 16
    assert 8 < log[-1]["curriculum/effective_prompts"] < 12 and 0.5 <= log[-1]["curriculum/pass_rate"] <= 1


@pytest.mark.parametrize("more", [{}, {"dynamic_sampling": {"max_rounds": 2}}])
def test_resume_draws_the_same_prompts(tmp_path, more):
    more |= {"training": {"beta": 0.0, "max_steps": 6, "save_steps": 3, "num_iterations": 2}}
    more |= {"rewards": [Even("number"), Vowels("vowels")], "curriculum": CURRICULUM}
    run(tmp_path / "a", **more)
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-3", tmp_path / "b")
    run(tmp_path / "b", resume_from=checkpoint, **more)
    one, other = ([untimed(x) for x in lines(tmp_path / name / "metrics.jsonl")[:6]] for name in "ab")
    assert one == other and one[4]["curriculum/seen"] > 2
    assert lines(tmp_path / "a" / "samples.jsonl") == lines(tmp_path / "b" / "samples.jsonl")


def test_what_a_curriculum_needs(tmp_path):
    with pytest.raises(ValueError, match="only a rule with a reference tells"):
        recipe(tmp_path, rewards=[{"rule": "format"}], curriculum=CURRICULUM)
    bare = [{key: value for key, value in row.items() if key != "reference"} for row in conversations(3)]
    for rows, said in (
        (conversations(2), "curriculum: each rollout takes all 2 prompts"),
        (conversations(5) + bare, "3 of the 8 rows have no reference"),
    ):
        with pytest.raises(ToolkitError, match=said):
            run(tmp_path, rows=rows, training=TRAINING, curriculum=CURRICULUM)
