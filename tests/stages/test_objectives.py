"""Recipes of objectives other than the paper's GRPO: advantages, loss and gradient are those of their papers.

The formulas are written out answer by answer and token by token, from log-probabilities of the plain model.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from conversations.rewards.base import Reward
from deepseek_v2_modeling.training.mixin import RunLimits
from recipes.recipe.loader import load_recipe
from rl.config import RlRecipe
from rl.stage import grpo_config, prompt_dataset
from rl.trainer import PolicyTrainer

from ..helpers.stages import SECTIONS, byte_tokenizer, chat_model, conversations

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
LONGEST = 16
TEMPERATURE = 1.1  # the policy is what was sampled from
GROUP = 4
PROMPTS = 2
# What two groups of answers say, in token ids, and what two rewards give them.
ANSWERS = [[70 + (3 * i + j) % 90 for j in range(size)] + [1] for i, size in enumerate((3, 7, 2, 9, 5, 4, 11, 6))]
RIGHT = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
POLITE = [0.2, 0.9, 0.4, 0.0, 0.3, 0.3, 0.8, 0.1]
Values = Sequence[float]


class Given(Reward):
    """Gives answers their values above, by their place in the batch."""

    def __init__(self, name: str, weight: float, values: Values):
        super().__init__(name, weight)
        self.values = values

    def judge(self, answers):
        assert len(answers) == len(self.values)
        return list(self.values)


def groups(values: Values) -> list[Values]:
    return [values[start : start + GROUP] for start in range(0, len(values), GROUP)]


def normalized(values: Values) -> list[float]:
    """(r - mean) / standard deviation, in each group."""
    return [(r - fmean(group)) / stdev(group) for group in groups(values) for r in group]


def centred(values: Values) -> list[float]:
    return [r - fmean(group) for group in groups(values) for r in group]


# --- the papers' objectives ---------------------------------------------------------------------------------------
# new, old: for each answer its tokens' log-probabilities; advantages: one for each answer -> what is to be maximised.

Logps = Sequence[torch.Tensor]


def clipped(ratio: torch.Tensor, advantage: float, low: float, high: float) -> torch.Tensor:
    return torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def dr_grpo(new: Logps, old: Logps, advantages: Values) -> torch.Tensor:
    """Liu et al.: the sum over tokens, divided by the number of answers and a constant (the longest length)."""
    each = [clipped((n - o).exp(), a, 0.2, 0.2).sum() for n, o, a in zip(new, old, advantages, strict=True)]
    return sum(each) / (len(each) * LONGEST)


def dapo(new: Logps, old: Logps, advantages: Values) -> torch.Tensor:
    """Yu et al., eq. 8: clip higher; the mean over all tokens of all answers."""
    each = [clipped((n - o).exp(), a, 0.2, 0.28).sum() for n, o, a in zip(new, old, advantages, strict=True)]
    return sum(each) / sum(len(n) for n in new)


def gspo(new: Logps, old: Logps, advantages: Values) -> torch.Tensor:
    """Zheng et al., eq. 5 and 7: s = (pi(y) / pi_old(y)) ** (1 / |y|), clipped; the mean over answers."""
    ratios = [((n.sum() - o.sum()) / len(n)).exp() for n, o in zip(new, old, strict=True)]
    return sum(clipped(s, a, 0.03, 0.04) for s, a in zip(ratios, advantages, strict=True)) / len(new)


def cispo(new: Logps, old: Logps, advantages: Values) -> torch.Tensor:
    """MiniMax-M1, eq. 4 and 5: sg(min(ratio, bound)) A log pi; the mean over all tokens of all answers."""
    each = [((n - o).exp().clamp(max=5.0).detach() * a * n).sum() for n, o, a in zip(new, old, advantages, strict=True)]
    return sum(each) / sum(len(n) for n in new)


def grpo(new: Logps, old: Logps, advantages: Values) -> torch.Tensor:
    """The paper's eq. 32, without its KL term."""
    each = [clipped((n - o).exp(), a, 0.2, 0.2).mean() for n, o, a in zip(new, old, advantages, strict=True)]
    return sum(each) / len(each)


def decoupled() -> list[float]:
    """GDPO: each reward normalised in its group, the weighted sum normalised over the batch."""
    summed = [r + 0.5 * p for r, p in zip(normalized(RIGHT), normalized(POLITE), strict=True)]
    return [(value - fmean(summed)) / stdev(summed) for value in summed]


def penalised() -> list[float]:
    return normalized([r + p for r, p in zip(RIGHT, POLITE, strict=True)])


CASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], list[float]]]] = {
    "rl_dr_grpo": (dr_grpo, lambda: centred(RIGHT)),
    "rl_dapo": (dapo, penalised),
    "rl_gspo": (gspo, lambda: normalized(RIGHT)),
    "rl_cispo": (cispo, lambda: normalized(RIGHT)),
    "rl_gdpo": (grpo, decoupled),
}


# --- what our trainer computes ----------------------------------------------------------------------------------------


def trainer_for(name: str, folder: Path) -> PolicyTrainer:
    """The recipe's objective and rewards' weights, on a small model and one batch."""
    written: Any = load_recipe(TINY / f"{name}.yaml").recipe
    small = {"per_device_train_batch_size": len(ANSWERS), "num_generations": GROUP, "steps_per_generation": 1}
    training = {**written.training, **small, "beta": 0.0}
    assert (training["max_completion_length"], training["temperature"]) == (LONGEST, TEMPERATURE)
    rewards = [entry.model_dump(exclude_defaults=True) for entry in written.rewards]
    recipe = RlRecipe(
        **{**SECTIONS, "rewards": rewards, "output_dir": str(folder), "stage": "rl", "training": training}
    )
    given = [
        Given(str(index), entry.weight, values)
        for index, (entry, values) in enumerate(zip(recipe.rewards, (RIGHT, POLITE), strict=False))
    ]
    return PolicyTrainer(
        chat_model(aux_loss_alpha=0.0),
        grpo_config(recipe, folder, RunLimits(), given),
        given,
        train_dataset=prompt_dataset(conversations(PROMPTS)),
        processing_class=byte_tokenizer(),
        limits=RunLimits(),
    )


def answer_logps(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[tokens of the answer], from the model's logits on this one conversation."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].float() / TEMPERATURE
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_advantages_loss_and_gradient_are_the_papers(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    objective, advantages_of = CASES[name]
    trainer = trainer_for(name, tmp_path)
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (ANSWERS, None))
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in trainer.train_dataset for _ in range(GROUP)]
    batch = trainer._generate_and_score_completions(rows)
    wanted = advantages_of()
    assert batch["advantages"].tolist() == pytest.approx(wanted, abs=2e-3)  # TRL adds 1e-4 to a standard deviation

    model: Any = trainer.model
    prompts = trainer._tokenize_prompts([row["prompt"] for row in rows])[0]
    new = [answer_logps(model, prompt, answer) for prompt, answer in zip(prompts, ANSWERS, strict=True)]
    torch.manual_seed(1)
    old = [n.detach() + 0.4 * torch.randn(len(n)) for n in new]
    loss = -objective(new, old, batch["advantages"].tolist())
    loss.backward()
    papers = gradients(model)

    model.zero_grad()
    batch["old_per_token_logps"] = torch.nn.utils.rnn.pad_sequence(old, batch_first=True)
    found = trainer.compute_loss(model, batch)
    found.backward()
    ours = gradients(model)
    assert found.item() == pytest.approx(loss.item(), abs=1e-5) and not math.isclose(loss.item(), 0, abs_tol=1e-3)
    assert papers.keys() == ours.keys()
    for key, gradient in papers.items():
        torch.testing.assert_close(ours[key], gradient, atol=1e-5, rtol=1e-3, msg=key)
