"""Over-optimisation of a reward model with one score head and with several, on a reward that is known.

    python -m benchmarks.overoptimization [FOLDER]      results/overoptimization.json and docs/overoptimization.svg

An answer is twelve digits. The gold reward knows what each digit is worth and counts none of them more than twice; a reward
model learns it from few pairs, some of which are labelled wrongly, and GRPO then optimises the reward model alone. All
of it runs through `dsv2`. Runs that are done are not repeated: use an empty folder to measure again.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from benchmarks.common import RESULTS, write
from recipes.cli import main as dsv2

SEEDS = (0, 1, 2)
DIGITS, LENGTH, COUNTED = "0123456789", 12, 2
PAIRS, WRONG = 256, 0.25  # of each seed; share of wrong labels
STEPS, WINDOW = 200, 10
ARMS = {"one head": (1, "mean"), "min of 4": (4, "min")}  # heads, how they are combined
GOLD = """
WORTH = {worth}


def gold(prompts, completions):
    return [sum(worth * min(c[-1]["content"].count(d), {counted}) for d, worth in WORTH.items()) for c in completions]
"""


def worth_of(seed: int) -> dict[str, float]:
    """What each digit is worth, from -1 to 1."""
    values = [2 * place / (len(DIGITS) - 1) - 1 for place in range(len(DIGITS))]
    random.Random(seed).shuffle(values)
    return dict(zip(DIGITS, values, strict=True))


def gold(answer: str, worth: dict[str, float]) -> float:
    return sum(worth[digit] * min(answer.count(digit), COUNTED) for digit in DIGITS)


def drawn(rng: random.Random) -> str:
    return "".join(rng.choices(DIGITS, k=LENGTH))


def pairs_of(seed: int) -> list[dict[str, Any]]:
    rng, worth = random.Random(f"pairs {seed}"), worth_of(seed)
    rows = []
    for number in range(PAIRS):
        better, worse = sorted((drawn(rng), drawn(rng)), key=lambda answer: -gold(answer, worth))
        if rng.random() < WRONG:
            better, worse = worse, better
        rows.append({"prompt": f"{number % 50} ?", "chosen": better, "rejected": worse})
    return rows


def started(folder: Path, name: str, recipe: dict[str, Any]) -> Path:
    """The run directory of a recipe that has run."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({**recipe, "output_dir": str(folder / name)}))
    if dsv2([recipe["stage"], str(path)]) != 0:
        raise SystemExit(f"{path} failed")
    return folder / name


def listed(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(path)}]


def policy_of(folder: Path) -> Path:
    """A model that answers with twelve digits by chance."""
    base, rng = folder / "base", random.Random(0)
    if not base.exists() and dsv2(["init", str(base), "--preset", "tiny"]) != 0:
        raise SystemExit("no model")
    rows = [{"prompt": f"{n % 50} ?", "completion": drawn(rng)} for n in range(4000)]
    training = {"max_steps": 120, "per_device_train_batch_size": 64, "learning_rate": 2e-3, "max_length": 32}
    data = listed(folder, "sft", rows)
    return started(folder, "policy", {"stage": "sft", "model": {"path": str(base)}, "data": data, "training": training})


def optimised(folder: Path, policy: Path, seed: int, arm: str) -> list[dict[str, float]]:
    """GRPO against a reward model of this seed: {proxy, gold} of each step."""
    heads, combine = ARMS[arm]
    name = f"{seed}_{heads}"
    model = {"path": str(policy)}
    recipe = {
        "stage": "reward", "model": model, "data": listed(folder, f"pairs_{seed}", pairs_of(seed)), "heads": heads, "seed": seed,
        "training": {"max_steps": 60, "per_device_train_batch_size": 64, "learning_rate": 5e-4, "max_length": 32},
    }  # fmt: skip
    reward_model = started(folder, f"reward_{name}", recipe)
    code = folder / f"gold_{seed}.py"
    code.write_text(GOLD.format(worth=worth_of(seed), counted=COUNTED))
    rewards = [{"model": str(reward_model), "combine": combine}, {"python": f"{code}:gold", "weight": 1e-6}]
    training = {
        "max_steps": STEPS, "per_device_train_batch_size": 64, "num_generations": 8, "max_completion_length": 16,
        "steps_per_generation": 1, "learning_rate": 3e-4, "beta": 0.0, "loss_type": "grpo", "logging_steps": 1,
        "save_strategy": "no",
    }  # fmt: skip
    recipe = {
        "stage": "rl", "model": model, "data": listed(folder, "prompts", [{"prompt": f"{n} ?"} for n in range(50)]),
        "rewards": rewards, "seed": seed, "training": training,
    }  # fmt: skip
    metrics = (started(folder, f"rl_{name}", recipe) / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, metrics) if "rewards/gold/mean" in line]
    proxy = next(key for key in steps[0] if key.startswith("rewards/reward_") and key.endswith("/mean"))
    return [{"proxy": line[proxy], "gold": line["rewards/gold/mean"]} for line in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        policy = policy_of(folder)
        for seed in args.seeds:
            for arm in ARMS:
                steps = optimised(folder, policy, seed, arm)
                for at in range(0, len(steps), 20):
                    part = steps[at : at + 20]
                    print(seed, arm, at, *(round(fmean(s[k] for s in part), 2) for k in ("proxy", "gold")), flush=True)


if __name__ == "__main__":
    main()
