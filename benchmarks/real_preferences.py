"""Reward models on real preferences, from a random v2-lite-mini: do they rank held-out answers better than chance?

    python -m benchmarks.real_preferences DATA [--only NAME]   results/real_preferences.json; about half an hour

DATA has hh_harmless_train.jsonl and hh_harmless_test.jsonl (Anthropic's hh-rlhf), dpo_en_demo.jsonl, dpo_zh_demo.jsonl
and kto_en_demo.jsonl (LLaMA-Factory's). Everything runs through the command line: `dsv2 init`, `reward` and `eval`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import RESULTS, write

TRAINING = {
    "learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 5, "num_train_epochs": 1,
    "per_device_train_batch_size": 8, "max_length": 512, "save_strategy": "no", "logging_steps": 4,
}  # fmt: skip
FIGURES = ("auc", "length_controlled", "length_correlation")


@dataclass(frozen=True)
class Data:
    """A data set: what the model is trained on, and which rows are held out."""

    train: dict[str, str]
    held_out: dict[str, str]
    loss: str = "pairwise"


def parts(name: str, loss: str = "pairwise") -> Data:
    """The first three quarters of a file, and the rest."""
    file = f"{name}.jsonl"
    return Data({"path": file, "split": "[:75%]"}, {"path": file, "split": "[75%:]"}, loss)


DATA = {
    "hh_harmless": Data({"path": "hh_harmless_train.jsonl", "split": "[:300]"}, {"path": "hh_harmless_test.jsonl"}),
    "dpo_en_demo": parts("dpo_en_demo"),
    "dpo_zh_demo": parts("dpo_zh_demo"),
    "kto_en_demo": parts("kto_en_demo", "pointwise"),
}


def dsv2(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "recipes.cli", *words], check=True)


def run(command: str, folder: Path, recipe: dict[str, Any]) -> Path:
    """Runs a recipe of a stage; its run directory."""
    file, output = folder / f"{command}.yaml", folder / command
    file.write_text(yaml.safe_dump({"stage": command, **recipe, "output_dir": str(output)}))
    dsv2(command, str(file))
    return output


def source(part: dict[str, str], folder: Path) -> dict[str, str]:
    return {**part, "path": str(folder / part["path"])}


def measured(name: str, data_folder: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Trains on a data set and evaluates on its held-out rows."""
    data = DATA[name]
    folder.mkdir()
    trained = run(
        "reward",
        folder,
        {
            "model": {"path": str(model), "dtype": "bfloat16"},
            "lora": None,
            "loss": data.loss,
            "data": [source(data.train, data_folder)],
            "training": TRAINING,
        },
    )
    task = {"name": "held_out", "metric": "reward", "data": [source(data.held_out, data_folder)]}
    found = run("eval", folder, {"model": {"path": str(trained)}, "tasks": [task]})
    results = json.loads((found / "results.json").read_text())
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    return {
        "accuracy": results["held_out"],
        "interval": results["held_out_interval"],
        "n": results["held_out_details"]["auc"]["n"],
        **{key: results["held_out_details"][key] for key in FIGURES},
        "last_losses": [step["loss"] for step in steps if "loss" in step][-3:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", choices=DATA, default=list(DATA))
    args = parser.parse_args()
    file = RESULTS / "real_preferences.json"
    found = json.loads(file.read_text())["sets"] if file.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dsv2("init", str(folder / "model"), "--preset", "v2-lite-mini")
        for name in args.only:
            found[name] = measured(name, args.data.resolve(), folder / "model", folder / name)
            write("real_preferences", {"training": TRAINING, "sets": found})


if __name__ == "__main__":
    main()
