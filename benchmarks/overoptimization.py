"""Over-optimisation of a reward model with one score head and with four, on a reward that is known.

    python -m benchmarks.overoptimization [FOLDER] [--seeds 15]   results/overoptimization.json and a plot in docs/

An answer is eight digits. The gold reward knows what each digit is worth and counts none of them more than twice. The
policy is the smallest there is, a table of probabilities for each place. At the start it says some digits often and
others rarely, and a reward model of the toolkit learns from a few pairs of such answers, a quarter of which are
labelled wrongly: of the rare digits it knows little. Then GRPO's advantages optimise the policy for the reward model
alone. Runs that FOLDER holds already are not repeated.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.common import write
from conversations.answers.reward_stats import RewardStats
from conversations.rewards.base import Answer, Reward, Values
from conversations.rewards.model import RewardModelReward
from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForSequenceClassification
from deepseek_v2_modeling.presets import PRESETS
from recipes.runs.preset_tokenizer import build_tokenizer
from reward.config import RewardRecipe
from reward.stage import train as train_reward

DIGITS, LENGTH, COUNTED = "0123456789", 8, 2
STEEP = 2  # how much rarer the digits of each rank are at the start
PAIRS, WRONG = 128, 0.25  # of each seed; share of wrong labels
MODEL_STEPS = 60
ANSWERS, STEPS, RATE = 64, 400, 0.05  # of GRPO
WINDOW = 9  # steps that curves are averaged over
FALLEN = 0.9  # gold has fallen if it ends below this share of its highest
SMALL = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 1}
SMALL |= {"topk_group": 1, "num_experts_per_tok": 2, "num_attention_heads": 8, "aux_loss_alpha": 0.0}
UNREAD: dict[str, Any] = {"data": [{"path": "unread"}], "output_dir": "unread", "model": {"path": "unread"}}
FILE = Path(__file__).parents[1] / "docs" / "overoptimization.svg"
Steps = list[dict[str, float]]  # {proxy, gold, kl} of each


@dataclass(frozen=True)
class Arm:
    """What the policy is optimised for: the least of the heads of one reward model, or of several models that learn
    from the same pairs."""

    heads: int = 1
    models: int = 1
    colour: str = "tab:red"


ARMS = {
    "one head": Arm(),
    "min of 4 heads": Arm(heads=4, colour="tab:blue"),
    "min of 4 models": Arm(models=4, colour="tab:green"),
}


class Gold(Reward):
    """What each digit of an answer is worth, from -1 to 1, none counted more than twice."""

    def __init__(self, seed: int):
        super().__init__("gold", weight=0.0)
        values = [2 * place / (len(DIGITS) - 1) - 1 for place in range(len(DIGITS))]
        random.Random(seed).shuffle(values)
        self.worth = dict(zip(DIGITS, values, strict=True))

    def value(self, text: str) -> float:
        return sum(worth * min(text.count(digit), COUNTED) for digit, worth in self.worth.items())

    def judge(self, answers: Sequence[Answer]) -> Values:
        return [self.value(answer.text) for answer in answers]


class Least(Reward):
    """The least of several rewards."""

    def __init__(self, rewards: Sequence[Reward]):
        super().__init__("proxy")
        self.rewards = rewards

    def judge(self, answers: Sequence[Answer]) -> Values:
        return [min(map(float, values)) for values in zip(*(one.judge(answers) for one in self.rewards), strict=True)]


def at_start(seed: int) -> list[float]:
    """The probability of each digit in the policy's first answers: falling with the square of its rank."""
    shares = [(1 + rank) ** -STEEP for rank in range(len(DIGITS))]
    random.Random(f"start {seed}").shuffle(shares)
    return [share / sum(shares) for share in shares]


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs_of(gold: Gold, seed: int) -> list[dict[str, Any]]:
    rng, shares, rows = random.Random(f"pairs {seed}"), at_start(seed), []
    for _ in range(PAIRS):
        drawn = ["".join(rng.choices(DIGITS, shares, k=LENGTH)) for _ in range(2)]
        answers = sorted(drawn, key=gold.value, reverse=rng.random() >= WRONG)
        chosen, rejected = (said("assistant", answer) for answer in answers)
        rows.append({"prompt": said("user", "?"), "chosen": chosen, "rejected": rejected})
    return rows


def reward_model(tokenizer: Any, rows: list[dict[str, Any]], heads: int, seed: int, run_dir: Path) -> Reward:
    """A reward model trained on these pairs from random weights; the seed decides on those, the bootstrap samples and
    the order of the rows."""
    torch.manual_seed(seed)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = DeepseekV2Config(**{**PRESETS["tiny"], **SMALL, **ids, "num_labels": heads})
    training = {
        "max_steps": MODEL_STEPS, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "max_length": 32,
        "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    model = DeepseekV2ForSequenceClassification(config)
    recipe = RewardRecipe(**UNREAD, stage="reward", heads=heads, seed=seed, training=training)
    train_reward(recipe, model=model, tokenizer=tokenizer, rows=rows, eval_rows=None, run_dir=run_dir, resume_from=None)
    stats = RewardStats.read(run_dir / "final")
    return RewardModelReward("proxy", model.eval(), tokenizer, stats=stats, combine="min")


def optimised(tokenizer: Any, seed: int, arm: str, folder: Path) -> Steps:
    """The steps of a policy that is optimised for the reward models of this seed and arm."""
    done = folder / f"{arm.replace(' ', '_')}_{seed}.json"
    if not done.exists():
        gold = Gold(seed)
        rows, heads = pairs_of(gold, seed), ARMS[arm].heads
        proxies = [
            reward_model(tokenizer, rows, heads, 1000 * number + seed, folder / f"{done.stem}_model_{number}")
            for number in range(ARMS[arm].models)
        ]
        done.write_text(json.dumps(climbed(Least(proxies), gold, seed)))
    return json.loads(done.read_text())


def climbed(proxy: Reward, gold: Gold, seed: int) -> Steps:
    torch.manual_seed(seed)
    start = torch.distributions.Categorical(torch.tensor(at_start(seed)).expand(LENGTH, -1))
    table = start.logits.clone().requires_grad_()
    optimizer, steps = torch.optim.Adam([table], lr=RATE), []
    for _ in range(STEPS):
        policy = torch.distributions.Categorical(logits=table)
        sampled = policy.sample(torch.Size([ANSWERS]))
        answers = [Answer(said("user", "?"), "".join(DIGITS[place] for place in row)) for row in sampled.tolist()]
        values = torch.tensor(proxy.judge(answers))
        golden = fmean(gold.value(answer.text) for answer in answers)
        kl = torch.distributions.kl_divergence(policy, start).sum().item()
        steps.append({"proxy": values.mean().item(), "gold": golden, "kl": kl})
        advantages = (values - values.mean()) / (values.std() + 1e-4)
        optimizer.zero_grad()
        (-(advantages[:, None] * policy.log_prob(sampled)).mean()).backward()
        optimizer.step()
    return steps


def smoothed(steps: Steps, key: str) -> list[float]:
    half = WINDOW // 2
    return [fmean(step[key] for step in steps[max(0, at - half) : at + half + 1]) for at in range(len(steps))]


def figures(steps: Steps) -> dict[str, Any]:
    """Where gold is highest (step, and nats from the start), how high, and what it and the proxy are at the end."""
    gold, proxy, kl = (smoothed(steps, key) for key in ("gold", "proxy", "kl"))
    peak = max(range(len(gold)), key=gold.__getitem__)
    found = {"peak_kl": kl[peak], "end_kl": kl[-1], "gold_peak": gold[peak], "gold_end": gold[-1]}
    found |= {"proxy_at_peak": proxy[peak], "proxy_end": proxy[-1]}
    rounded = {name: round(value, 2) for name, value in found.items()}
    return {"peak_step": peak + 1, **rounded, "falls": gold[-1] < FALLEN * gold[peak]}


def draw(curves: dict[str, dict[int, Steps]]) -> None:
    """Gold and proxy by step: the mean of an arm's seeds, and each seed faintly."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "overoptimization"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharex=True)
    for arm, of_seeds in curves.items():
        for ax, key in zip(axes, ("proxy", "gold"), strict=True):
            each = [smoothed(steps, key) for steps in of_seeds.values()]
            steps, colour = range(1, STEPS + 1), ARMS[arm].colour
            for one in each:
                ax.plot(steps, one, color=colour, alpha=0.25, linewidth=0.7)
            ax.plot(steps, [fmean(at) for at in zip(*each, strict=True)], color=colour, label=arm)
    for ax, title in zip(axes, ("reward model (normalised)", "gold reward"), strict=True):
        ax.set(title=title, xlabel="GRPO step")
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(FILE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["one head", "min of 4 heads"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = build_tokenizer("tiny")
        curves: dict[str, dict[int, Steps]] = {arm: {} for arm in args.arms}
        for seed in range(args.seeds):
            for arm in args.arms:
                curves[arm][seed] = optimised(tokenizer, seed, arm, folder)
                print(arm, seed, figures(curves[arm][seed]), flush=True)
    draw(curves)
    write("overoptimization", {arm: {seed: figures(s) for seed, s in of.items()} for arm, of in curves.items()})


if __name__ == "__main__":
    main()
