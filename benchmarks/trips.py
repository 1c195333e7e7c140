"""Counts the files of ours that typical calls enter, and the changes from one file to another. Measures no time.

    python benchmarks/trips.py [--trip NAME] [--show]

Each trip is one call of a public function on a tiny model or row, traced by `sys.setprofile`: every call of one of our
functions is a step, in the file that defines it. A change is a step in a different file from the step before. Imports
happen before the trace. `--show` prints one line for each change.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("conversations", "deepseek_v2_modeling", "eval", "pairs", "recipes", "reward", "rl", "sft")
PLAIN = {"messages": [{"role": "user", "content": "What is 17 + 25?"}, {"role": "assistant", "content": "42."}]}


def walk(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """(file, function) of each step of a call."""
    steps: list[tuple[str, str]] = []
    ours: dict[str, str | None] = {}

    def step(frame: Any, event: str, _: Any) -> None:
        if event != "call":
            return
        name = frame.f_code.co_filename
        if name not in ours:
            path = Path(name)
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES
            ours[name] = str(path.relative_to(ROOT)) if inside else None
        file = ours[name]
        if file is not None and frame.f_code.co_name != "<module>":
            steps.append((file, frame.f_code.co_name))

    sys.setprofile(step)
    try:
        call()
    finally:
        sys.setprofile(None)
    return steps


def changes(steps: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The steps in a different file from the step before, including the first."""
    files = [None, *(file for file, _ in steps)]
    return [step for step, before in zip(steps, files, strict=False) if step[0] != before]


def row_trip(folder: Path) -> Callable[[], Any]:
    from conversations import load_conversations

    path = folder / "rows.jsonl"
    path.write_text(json.dumps(PLAIN) + "\n")
    return lambda: list(load_conversations(path))


def render_trip(folder: Path) -> Callable[[], Any]:
    from transformers import AutoTokenizer

    from conversations import render_conversation

    tokenizer = AutoTokenizer.from_pretrained(make_model(folder))
    return lambda: render_conversation(PLAIN["messages"], tokenizer)


def reward_trip(folder: Path) -> Callable[[], Any]:
    from conversations.rewards.rule import RuleReward

    reward = RuleReward("number")
    prompts, answers = [PLAIN["messages"][:1]], [PLAIN["messages"][1:]]
    return lambda: reward(prompts=prompts, completions=answers, reference=["42"])


def loading_trip(folder: Path) -> Callable[[], Any]:
    from deepseek_v2_modeling import DeepseekV2ForCausalLM

    model = make_model(folder)
    return lambda: DeepseekV2ForCausalLM.from_pretrained(model)


def make_model(folder: Path) -> Path:
    from recipes.cli import main

    model = folder / "model"
    if not model.exists():
        main(["init", str(model), "--preset", "tiny"])
    return model


def make_adapter(folder: Path) -> Path:
    """A run with an adapter on attention and experts."""
    from recipes.cli import main

    run = folder / "run"
    if not run.exists():
        recipe = str(ROOT / "recipes" / "tiny" / "sft.yaml")
        lora = "lora={targets: [attention, experts, shared_experts]}"
        main(["sft", recipe, "--smoke", f"model.path={make_model(folder)}", lora, f"output_dir={run}"])
    return run


def adapter_trip(folder: Path) -> Callable[[], Any]:
    """An adapter of a run -> a model that continues training it, as an RL stage does."""
    from deepseek_v2_modeling.loading import prepare_trainable
    from recipes.cli import main  # noqa: F401 - loaded outside the trace

    run = make_adapter(folder)
    config = json.loads((run / "final" / "adapter_config.json").read_text())
    return lambda: trainable(prepare_trainable, run, config)


def trainable(prepare: Callable[..., Any], run: Path, config: dict[str, Any]) -> Any:
    from deepseek_v2_modeling.loading import LoraSettings

    try:
        from deepseek_v2_modeling.checkpoints.sources import resolve_source
    except ImportError:
        from deepseek_v2_modeling.loading import resolve_source  # pyright: ignore
    targets = ("attention", "experts", "shared_experts")
    lora = LoraSettings(targets, r=config["r"], alpha=config["lora_alpha"])
    return prepare(resolve_source(run), lora=lora, merge_dir=run / "base")


def merge_trip(folder: Path) -> Callable[[], Any]:
    from deepseek_v2_modeling import merge_lora

    run = make_adapter(folder)
    out = (folder / f"merged{n}" for n in itertools.count())
    return lambda: merge_lora(run, next(out))


def report_trip(folder: Path) -> Callable[[], Any]:
    from recipes.cli import main

    run = make_adapter(folder)
    return lambda: main(["report", str(run)])


def forward_trip(folder: Path) -> Callable[[], Any]:
    import torch

    from deepseek_v2_modeling import DeepseekV2ForCausalLM

    model = DeepseekV2ForCausalLM.from_pretrained(make_model(folder), dtype=torch.float32).train()
    tokens = torch.arange(16)[None]
    return lambda: model(input_ids=tokens, labels=tokens)


TRIPS = {
    "row -> canonical row": row_trip,
    "messages -> ids and loss mask": render_trip,
    "completion -> reward": reward_trip,
    "hub files -> fused parameters": loading_trip,
    "adapter -> trainable model": adapter_trip,
    "training forward": forward_trip,
    "merge": merge_trip,
    "run -> report": report_trip,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trip", choices=[*TRIPS])
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as directory:
        for name, trip in TRIPS.items():
            if arguments.trip not in (None, name):
                continue
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                call = trip(Path(directory))
                call()  # what is imported or cached on the first call
                steps = walk(call)
            print(f"{name}: {len({file for file, _ in steps})} files, {len(changes(steps))} changes")
            if arguments.show:
                for file, function in changes(steps):
                    print(f"    {file} {function}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
