"""Memory of a policy and two reward models that are adapters of one base: on one copy of its weights, and on their own.

Tensors are counted once where they are shared. The peak is that of anonymous memory while the models are loaded, each
reward model scores a batch and the policy makes a training step of its adapter; each run is a separate process.

    python -m benchmarks.one_base           v2-lite-mini in bf16, adapters of rank 8 on attention and experts
    python -m benchmarks.one_base --rank 16
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import peak_of_memory, write
from deepseek_v2_modeling.inference import score_heads
from deepseek_v2_modeling.loading import LoraSettings, load_model, prepare_trainable, resolve_source
from recipes.runs.new_model import make_model

SIDES = ("policy alone", "on one base", "on their own")
JUDGES = ("judge_1", "judge_2")
TARGETS = ("attention", "experts", "shared_experts")
ROWS, TOKENS = 8, 256


def make(folder: Path, rank: int) -> None:
    """The base and two reward models, as their stage leaves them."""
    make_model(folder / "base", "v2-lite-mini", 0)
    for name in JUDGES:
        judge = trainable(folder, rank, "score")
        judge.save_pretrained(str(folder / name))


def trainable(folder: Path, rank: int, head: Any = "causal_lm") -> Any:
    source, lora = resolve_source(folder / "base"), LoraSettings(TARGETS, rank, 2 * rank)
    return prepare_trainable(source, lora=lora, merge_dir=folder / "unused", head=head, dtype="bfloat16")


def use(side: str, folder: Path, rank: int) -> list[Any]:
    """Load the models of a side and run each of them."""
    ids = torch.randint(100, 8000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    policy = trainable(folder, rank)
    models = [policy]
    for name in JUDGES if side != SIDES[0] else ():
        on = policy if side == SIDES[1] else None
        models.append(load_model(resolve_source(folder / name), head="score", dtype="bfloat16", on=on))
        score_heads(models[-1], ids.tolist(), pad_token_id=0)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    with torch.autocast("cpu", torch.bfloat16):
        policy.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return models


def measure(side: str, folder: Path, rank: int) -> dict[str, float]:
    with peak_of_memory() as peaks:
        models = use(side, folder, rank)
    tensors = {p.data_ptr(): p.numel() * p.element_size() for model in models for p in model.parameters()}
    return {"weights_mb": sum(tensors.values()) / 1e6, "peak_mb": peaks[0] * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]), args.rank)))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.rank)
        for side in SIDES:
            command = [sys.executable, "-m", "benchmarks.one_base", "--rank", str(args.rank), "--one", side, folder]
            process = subprocess.run(command, capture_output=True, text=True, check=True)
            figures[side] = json.loads(process.stdout.splitlines()[-1])
    for side, found in figures.items():
        parts = (f"{key} {value:8.1f} ({value / figures[SIDES[0]][key]:.2f} x)" for key, value in found.items())
        print(f"{side:<14} {'   '.join(parts)}")
    write("one_base", {"rank": args.rank, "models": figures})


if __name__ == "__main__":
    main()
