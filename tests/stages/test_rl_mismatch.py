"""The rollout's log-probabilities and experts against the update's, and importance weights for their difference."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conversations.errors import ToolkitError
from conversations.rewards.base import Reward
from deepseek_v2_modeling.inference import generate_answers, record_answers
from deepseek_v2_modeling.routing_replay import record_routing
from rl.config import RolloutCorrection
from rl.rollouts.mismatch import agreement_sums, correction, log_ratios, mismatch_sums
from rl.stage import build_trainer

from ..helpers.rl import Vowels, perturbed, recipe, run, sample_from, trainer_for, untimed
from ..helpers.stages import byte_tokenizer, chat_model, conversations, lines, stopped_after

MODES = ("token_truncate", "token_mask", "sequence_mask")
PLAIN = {"beta": 0.0, "save_strategy": "no"}
RATIOS = st.lists(st.floats(-3, 3), min_size=1, max_size=6)


@given(st.lists(RATIOS, min_size=1, max_size=4), st.sampled_from(MODES), st.floats(1.1, 4))
def test_weights_and_figures_are_those_of_their_definitions(rows, mode, cap):
    longest = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    policy = torch.tensor([[*row, *[7.0] * (longest - len(row))] for row in rows], dtype=torch.float64) - 5
    ratio = log_ratios(policy, torch.full_like(policy, -5.0), mask)
    weights = correction(ratio, mode, cap).expand(mask.shape)
    k3 = outside = 0.0
    for row, of_row, found in zip(rows, ratio, weights, strict=True):
        for value, log, weight in zip(row, of_row.tolist(), found.tolist(), strict=False):
            assert log == pytest.approx(value)
            r = math.exp(sum(row) if mode == "sequence_mask" else value)
            wanted = min(r, cap) if mode == "token_truncate" else r if 1 / cap <= r <= cap else 0.0
            near = any(abs(r - bound) < 1e-6 for bound in (cap, 1 / cap))
            assert weight == pytest.approx(wanted, rel=1e-6) or near
            k3 += math.exp(value) - 1 - value
            outside += abs(value) > math.log(2)
    sums = mismatch_sums(ratio, mask).tolist()
    assert sums[0] == pytest.approx(k3, abs=1e-9) and sums[2] == mask.sum()
    assert sums[1] == outside or any(abs(abs(v) - math.log(2)) < 1e-6 for row in rows for v in row)


def test_tokens_without_a_log_probability_and_experts_in_any_order():
    nan = float("nan")
    ratio = log_ratios(torch.tensor([[-1.0, -2.0]]), torch.tensor([[nan, -2.5]]), torch.ones(1, 2))
    assert ratio.tolist() == [[0.0, 0.5]]
    one, other = torch.tensor([[[0, 3], [1, 2]]]), torch.tensor([[[3, 0], [1, 4]]])
    assert agreement_sums(one, other).tolist() == [1, 2]


@pytest.mark.parametrize("batch_size", [2, 8])
def test_what_sampling_knew_is_what_a_forward_gives(batch_size):
    """Slots that are refilled and dropped, prompts of different lengths, other ends."""
    model = chat_model().eval()
    prompts = [[0, 70, 71, 72], [0, 80], [0, 80], [0, 90, 91], [0, 70, 71, 72]]
    settings = {"pad_token_id": 2, "eos_token_id": list(range(100, 140)), "max_new_tokens": 9, "temperature": 1.3}
    with record_answers(prompts=True) as record:
        answers = generate_answers(model, prompts, batch_size=batch_size, seeds=range(5), **settings)
        answers += generate_answers(model, prompts[:1], **settings)
    assert len(record.logps) == len(record.routes) == len(answers) == 6
    assert len({len(answer) for answer in answers}) > 1
    columns = (record.logps, record.routes, record.prompt_routes)
    for prompt, answer, logps, routes, read in zip([*prompts, prompts[0]], answers, *columns, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad(), record_routing(model) as forward:
            scores = (model(ids).logits[0] / 1.3).log_softmax(-1)[len(prompt) - 1 : -1]
        wanted = scores.gather(1, torch.tensor(answer)[:, None]).flatten()
        torch.testing.assert_close(torch.tensor(logps), wanted, atol=1e-5, rtol=0)
        experts = torch.stack([layer[0, :-1] for layer in forward[0]], dim=1)
        assert len(routes) == len(answer) - 1 and len(read) == len(prompt)
        known = torch.cat([read, *(route[None] for route in routes)])
        assert torch.equal(known.sort(-1).values.long(), experts.sort(-1).values)
    assert generate_answers(model, prompts[:1], **settings) and len(record.logps) == 6  # no longer recorded


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"steps_per_generation": 2, "max_steps": 2}])
def test_in_float32_rollout_and_update_agree(tmp_path, settings):
    run(tmp_path, training={**PLAIN, "max_steps": 3, "temperature": 1.2, **settings})
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert log
    for line in log:
        assert 0 <= line["mismatch/k3"] < 1e-8 and line["mismatch/outside_x2"] == 0
    assert log[0]["mismatch/routes_agree"] == 1


def test_another_sampler_is_seen(tmp_path, monkeypatch):
    model = chat_model()
    sampler = perturbed(model, 1.0)  # before TRL changes the model's forward
    trainer = trainer_for(tmp_path, model=model, training={**PLAIN, "max_steps": 2})
    sample_from(trainer, sampler, monkeypatch)
    trainer.train()
    for line in [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]:
        assert line["mismatch/k3"] > 1e-3 and line["mismatch/outside_x2"] > 0
        assert 0 < line["mismatch/routes_agree"] < 1


def test_sampling_that_says_no_log_probabilities_has_no_figures_and_no_correction(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, training={**PLAIN, "max_steps": 1})
    monkeypatch.setattr(type(trainer), "_generate_single_turn", said_without_log_probabilities)
    trainer.train()
    assert not [key for key in lines(tmp_path / "metrics.jsonl")[0] if key.startswith("mismatch")]
    trainer.rollout_correction = RolloutCorrection(mode="token_mask")
    with pytest.raises(ToolkitError, match="rollout_correction needs the log-probabilities"):
        trainer._answer([{"prompt": [{"role": "user", "content": "1 + 1"}], "reference": "2"}])


def said_without_log_probabilities(self, prompt_ids, *args, **kwargs):
    return [answer.ids for answer in self.answers] or [[70 + i, 71, 1] for i in range(len(prompt_ids))], None


# --- the correction ---------------------------------------------------------------------------------------------------


class Token(Reward):
    """A value of the first byte that an answer says."""

    def judge(self, answers):
        return [float(sum(map(ord, answer.text[:1])) % 7) for answer in answers]


def sampled_as_often_as_likely(trainer, sampler, monkeypatch, rows):
    """Of `rows` answers of one token each token as many as it is likely: there is no chance in the gradient."""

    def sample(self, prompt_ids, *args, **kwargs):
        if self.answers:
            return [a.ids for a in self.answers], [a.logps for a in self.answers]
        with torch.no_grad():
            logps = (sampler(torch.tensor(prompt_ids[:1])).logits[0, -1] / self.temperature).log_softmax(-1)
        bounds = (logps.exp().double().cumsum(0) * rows).round().long()
        tokens = torch.searchsorted(bounds, torch.arange(rows), right=True).clamp(max=len(logps) - 1)
        return tokens[:, None].tolist(), logps[tokens][:, None].tolist()

    monkeypatch.setattr(type(trainer), "_generate_single_turn", sample)


def gradient(folder, monkeypatch, model, sampler, mode):
    """Of the policy, from the answers of a sampler."""
    rows = 3000
    training = {"per_device_train_batch_size": rows, "num_generations": rows, "max_completion_length": 1}
    training |= {**PLAIN, "max_steps": 1, "loss_type": "grpo", "scale_rewards": "none", "max_grad_norm": 0.0}
    correct = RolloutCorrection(mode=mode, cap=4.0) if mode else None
    policy = copy.deepcopy(model)
    trainer = trainer_for(folder, model=policy, rewards=[Token("t")], training=training, rollout_correction=correct)
    with monkeypatch.context() as patch:
        sampled_as_often_as_likely(trainer, sampler, patch, rows)
        inputs = trainer._prepare_inputs([trainer.train_dataset[0]] * rows)
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, inputs).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("mode", MODES)
def test_the_correction_recovers_the_gradient_of_sampling_from_the_policy(tmp_path, monkeypatch, mode):
    model = chat_model(aux_loss_alpha=0.0)
    other = perturbed(model, 0.5)
    wanted = gradient(tmp_path / "a", monkeypatch, model, copy.deepcopy(model).eval(), None)
    plain = gradient(tmp_path / "b", monkeypatch, model, other, None)
    corrected = gradient(tmp_path / "c", monkeypatch, model, other, mode)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(wanted, corrected, dim=0) > 0.99 > 0.97 > cosine(wanted, plain, dim=0)


@pytest.mark.parametrize("loss", ["dapo", "cispo", "vespo", "dr_grpo"])
def test_a_correction_of_nothing_changes_nothing_whatever_the_loss(tmp_path, loss):
    """Rollout and update agree in float32, and all weights are 1."""
    settings = {**PLAIN, "loss_type": loss, "max_steps": 2}
    settings |= {"epsilon_high": 5.0} if loss == "cispo" else {}
    run(tmp_path / "without", training=settings)
    run(tmp_path / "with", training=settings, rollout_correction={"mode": "token_truncate"})
    for one, other in zip(*(lines(tmp_path / name / "metrics.jsonl")[:2] for name in ("without", "with")), strict=True):
        one, other = untimed(one), untimed(other)
        assert one.keys() == other.keys()
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_the_correction_of_a_recipe_is_applied(tmp_path, monkeypatch):
    norms = []
    for name, correct in (("without", None), ("with", {"mode": "token_truncate", "cap": 1.1})):
        model, folder = chat_model(), tmp_path / name
        sampler = perturbed(model, 1.0)  # before TRL changes the model's forward
        asked = recipe(folder, training={**PLAIN, "max_steps": 1}, rollout_correction=correct)
        given = {"rows": conversations(16), "rewards": [Vowels("vowels")], "run_dir": folder}
        trainer = build_trainer(asked, model=model, tokenizer=byte_tokenizer(), **given)
        with monkeypatch.context() as patch:
            sample_from(trainer, sampler, patch)
            trainer.train()
        norms.append(lines(folder / "metrics.jsonl")[0]["grad_norm"])
    assert norms[0] > 0 and norms[1] != pytest.approx(norms[0], rel=1e-2)


def test_resume_between_two_updates_keeps_what_sampling_knew(tmp_path):
    more = {"rollout_correction": {"mode": "token_mask"}, "rewards": [Vowels("vowels")]}
    training = {"beta": 0.0, "num_iterations": 2, "max_steps": 4, "save_steps": 3}
    run(tmp_path / "a", training=training, **more)
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-3", tmp_path / "b")
    run(tmp_path / "b", training=training, resume_from=checkpoint, **more)
    one, other = ([untimed(x) for x in lines(tmp_path / name / "metrics.jsonl")[:4]] for name in "ab")
    assert one == other and all("mismatch/routes_agree" in line for line in one)


def test_two_corrections_for_vllm_are_refused(tmp_path):
    trainer = trainer_for(tmp_path, training=PLAIN)
    trainer.rollout_correction, trainer.args.use_vllm = RolloutCorrection(mode="token_truncate"), True
    with pytest.raises(ToolkitError, match="correct the same; leave one out"):
        trainer.check_correction()
