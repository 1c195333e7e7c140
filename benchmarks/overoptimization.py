"""Over-optimisation of a reward model with one score head and with four, on a reward that is known.

    python -m benchmarks.overoptimization [FOLDER]   results/overoptimization.json, docs/overoptimization.svg; minutes

An answer is eight digits. The gold reward knows what each digit is worth and counts none of them more than twice; a
reward model of the toolkit learns it from a few pairs, a quarter of which are labelled wrongly. The policy is the
smallest there is, a table of probabilities for each place; GRPO's advantages optimise it for the reward model alone.
Runs that FOLDER holds already are not repeated.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.common import write
from conversations.answers.combining import Combine
from conversations.answers.reward_stats import RewardStats
from conversations.rewards.base import Answer, Reward, Values
from conversations.rewards.model import RewardModelReward
from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForSequenceClassification
from deepseek_v2_modeling.presets import PRESETS
from recipes.runs.preset_tokenizer import build_tokenizer
from reward.config import RewardRecipe
from reward.stage import train as train_reward

SEEDS = (0, 1, 2)
DIGITS, LENGTH, COUNTED = "0123456789", 8, 2
PAIRS, WRONG = 128, 0.25  # of each seed; share of wrong labels
ANSWERS, STEPS, RATE = 64, 150, 0.05  # of GRPO
WINDOW = 9  # steps that curves are averaged over
ARMS: dict[str, tuple[int, Combine]] = {"one head": (1, "mean"), "min of 4 heads": (4, "min")}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 1}
SMALL |= {"topk_group": 1, "num_experts_per_tok": 2, "num_attention_heads": 8, "aux_loss_alpha": 0.0}
UNREAD: dict[str, Any] = {"data": [{"path": "unread"}], "output_dir": "unread", "model": {"path": "unread"}}
FILE = Path(__file__).parents[1] / "docs" / "overoptimization.svg"


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


def drawn(rng: random.Random) -> str:
    return "".join(rng.choices(DIGITS, k=LENGTH))


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs_of(gold: Gold, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"pairs {seed}")
    rows = []
    for _ in range(PAIRS):
        answers = sorted((drawn(rng), drawn(rng)), key=gold.value, reverse=rng.random() >= WRONG)
        chosen, rejected = (said("assistant", answer) for answer in answers)
        rows.append({"prompt": said("user", "?"), "chosen": chosen, "rejected": rejected})
    return rows


def reward_model(tokenizer: Any, gold: Gold, seed: int, arm: str, run_dir: Path) -> RewardModelReward:
    heads, combine = ARMS[arm]
    torch.manual_seed(seed)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = DeepseekV2Config(**{**PRESETS["tiny"], **SMALL, **ids, "num_labels": heads})
    training = {
        "max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "max_length": 32,
        "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    model, rows = DeepseekV2ForSequenceClassification(config), pairs_of(gold, seed)
    recipe = RewardRecipe(**UNREAD, stage="reward", heads=heads, seed=seed, training=training)
    train_reward(recipe, model=model, tokenizer=tokenizer, rows=rows, eval_rows=None, run_dir=run_dir, resume_from=None)
    stats = RewardStats.read(run_dir / "final")
    return RewardModelReward("proxy", model.eval(), tokenizer, stats=stats, combine=combine)


def optimised(tokenizer: Any, seed: int, arm: str, folder: Path) -> list[dict[str, float]]:
    """A policy that is optimised for a reward model of this seed: {proxy, gold} of each step."""
    run_dir, gold = folder / f"{arm.replace(' ', '_')}_{seed}", Gold(seed)
    done = run_dir / "steps.json"
    if not done.exists():
        proxy = reward_model(tokenizer, gold, seed, arm, run_dir)
        done.write_text(json.dumps(climbed(proxy, gold, seed)))
    return json.loads(done.read_text())


def climbed(proxy: RewardModelReward, gold: Gold, seed: int) -> list[dict[str, float]]:
    torch.manual_seed(seed)
    table = torch.zeros(LENGTH, len(DIGITS), requires_grad=True)  # logits
    optimizer, steps = torch.optim.Adam([table], lr=RATE), []
    for _ in range(STEPS):
        policy = torch.distributions.Categorical(logits=table)
        drawn = policy.sample(torch.Size([ANSWERS]))
        answers = [Answer(said("user", "?"), "".join(DIGITS[place] for place in row)) for row in drawn.tolist()]
        values = torch.tensor(proxy.judge(answers))
        steps.append({"proxy": values.mean().item(), "gold": fmean(gold.value(answer.text) for answer in answers)})
        advantages = (values - values.mean()) / (values.std() + 1e-4)
        optimizer.zero_grad()
        (-(advantages[:, None] * policy.log_prob(drawn)).mean()).backward()
        optimizer.step()
    return steps


def smoothed(steps: Sequence[dict[str, float]], key: str) -> list[float]:
    half = WINDOW // 2
    return [fmean(step[key] for step in steps[max(0, at - half) : at + half + 1]) for at in range(len(steps))]


def figures(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Where gold is highest, how high, and what it and the proxy have become at the end."""
    gold, proxy = smoothed(steps, "gold"), smoothed(steps, "proxy")
    peak = max(range(len(gold)), key=gold.__getitem__)
    found = {"gold_peak": gold[peak], "gold_end": gold[-1], "proxy_at_peak": proxy[peak], "proxy_end": proxy[-1]}
    return {"peak_step": peak + 1, **{name: round(value, 3) for name, value in found.items()}}


def draw(curves: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "overoptimization"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharex=True)
    for (arm, of_seeds), colour in zip(curves.items(), ("tab:red", "tab:blue"), strict=True):
        for ax, key in zip(axes, ("proxy", "gold"), strict=True):
            each = [smoothed(steps, key) for steps in of_seeds.values()]
            for one in each:
                ax.plot(range(1, len(one) + 1), one, color=colour, alpha=0.3, linewidth=0.8)
            ax.plot(range(1, len(each[0]) + 1), [fmean(at) for at in zip(*each, strict=True)], color=colour, label=arm)
    for ax, title in zip(axes, ("reward model (normalised)", "gold reward"), strict=True):
        ax.set(title=title, xlabel="GRPO step")
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(FILE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--only", help="ARM:SEED; the figures are written when all runs are there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        tokenizer = build_tokenizer("tiny")
        chosen = [(arm, seed) for seed in SEEDS for arm in ARMS if args.only in (None, f"{arm}:{seed}")]
        found = {(arm, seed): optimised(tokenizer, seed, arm, folder) for arm, seed in chosen}
        for (arm, seed), steps in found.items():
            print(arm, seed, figures(steps), [round(v, 2) for v in smoothed(steps, "gold")[::10]], flush=True)
    if args.only is None:
        curves = {arm: {seed: found[arm, seed] for seed in SEEDS} for arm in ARMS}
        draw(curves)
        write("overoptimization", {arm: {seed: figures(s) for seed, s in of.items()} for arm, of in curves.items()})


if __name__ == "__main__":
    main()
