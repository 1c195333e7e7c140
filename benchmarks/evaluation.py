"""Compares lm-eval through our model with its `hf` model on stock transformers: row by row, and in time.

    python -m benchmarks.evaluation [--rows 300] [--shots 0] [--gsm8k FILE]      results/evaluation_N_shot.json

v2-lite-mini with random weights in float32 on this machine's CPU, the same weights on both sides. GSM8K's problems are
answered after `--shots` worked examples, until "Question:" or 128 tokens; multiple choice has four choices of a few
words; whole texts are GSM8K's solutions. Without --gsm8k made-up sums take their place. `times_as_fast` is by seconds
of CPU time, which other programs on the machine hardly change.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM as StockModel

from benchmarks.common import write
from deepseek_v2_modeling import DeepseekV2ForCausalLM
from eval.harness.crew import Crew
from eval.harness.lm import ToolkitLM
from eval.harness.responses import Responses
from eval.harness.scoring import chain_of_thought
from recipes.runs.new_model import make_model

BATCH = 32
MAX_NEW_TOKENS = 128
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def problems(file: Path | None, count: int) -> list[dict[str, str]]:
    """Questions with worked answers."""
    if file is not None:
        lines = file.read_text(encoding="utf-8").splitlines()[:count]
        return [json.loads(line) for line in lines]
    return [
        {"question": f"What is {i} + {7 * i}?", "answer": f"{i} + {7 * i} = {8 * i}\n#### {8 * i}"}
        for i in range(count)
    ]


def requests(kind: str, rows: list[dict[str, str]], shots: int) -> list[Instance]:
    """lm-eval's requests of one kind for these rows, after so many examples."""
    examples = chain_of_thought()[:shots]
    before = "".join(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in examples)
    arguments: list[tuple[Any, ...]] = []
    for number, row in enumerate(rows):
        asked = f"{before}Question: {row['question']}\nAnswer:"
        if kind == "generate_until":
            arguments.append((asked, {"until": ["Question:"], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False}))
        elif kind == "loglikelihood_rolling":
            arguments.append((row["answer"],))
        else:
            others = [rows[(number + step) % len(rows)]["answer"] for step in range(4)]
            choices = (" " + answer.split("\n")[0][:60] for answer in others)
            arguments += [(asked, choice) for choice in choices]
    return [Instance(kind, {}, each, 0, metadata=("task", number, 1)) for number, each in enumerate(arguments)]


def timed(lm: Any, kind: str, asked: list[Instance]) -> tuple[list[Any], float]:
    start = time.process_time()
    found = getattr(lm, kind)(asked)
    return found, time.process_time() - start


def compared(kind: str, ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """How far the two sides differ, over rows."""
    if kind == "generate_until":
        return {"equal": sum(str(a) == b for a, b in zip(ours, theirs, strict=True)), "of": len(ours)}
    first, second = ([x[0] if isinstance(x, tuple) else x for x in side] for side in (ours, theirs))
    differences = [abs(a - b) for a, b in zip(first, second, strict=True)]
    figures: dict[str, Any] = {"largest_difference_nats": max(differences), "of": len(ours)}
    if kind == "loglikelihood":
        figures["equal_greedy"] = sum(a[1] == b[1] for a, b in zip(ours, theirs, strict=True))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="rows of each kind of request")
    parser.add_argument("--shots", type=int, default=0, choices=range(9), help="worked examples in a prompt")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's test file")
    parser.add_argument("--toy", action="store_true", help="the same code at toy size; writes nothing")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.rows = 3
    torch.manual_seed(0)
    figures: dict[str, Any] = {"rows": arguments.rows, "shots": arguments.shots}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        make_model(path, "tiny" if arguments.toy else "v2-lite-mini", 0)
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model = DeepseekV2ForCausalLM.from_pretrained(path).eval()
        positions = 4096
        crew = Crew(
            model, tokenizer, PartialState(cpu=True), Responses(Path(folder) / "run", PartialState(cpu=True), False)
        )
        crew.batch_size = BATCH
        ours = ToolkitLM(tokenizer, positions, crew, too_long="cut")
        stock = StockModel.from_pretrained(path, dtype=torch.float32).eval()
        theirs = HFLM(pretrained=stock, tokenizer=tokenizer, batch_size=BATCH, max_length=positions)  # pyright: ignore[reportArgumentType]
        rows = problems(arguments.gsm8k, arguments.rows)
        for kind in arguments.kinds:
            asked = requests(kind, rows, arguments.shots)
            (found, own_seconds), (wanted, stock_seconds) = timed(ours, kind, asked), timed(theirs, kind, asked)
            figures[kind] = {
                **compared(kind, found, wanted),
                "cpu_seconds": round(own_seconds, 2),
                "stock_cpu_seconds": round(stock_seconds, 2),
                "times_as_fast": round(stock_seconds / own_seconds, 2),
            }
            print(kind, figures[kind], flush=True)
    if not arguments.toy:
        write(f"evaluation_{arguments.shots}_shot", figures)


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
