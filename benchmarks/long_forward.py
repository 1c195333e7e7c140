"""A forward of 32,768 tokens in bf16 (v2-lite-mini): seconds and anonymous memory above the weights.

python -m benchmarks.long_forward           about five minutes on 2 cores; results/long_forward.json
"""

import argparse
import time
from typing import Any

import torch

from benchmarks.common import peak_of_memory, write
from deepseek_v2_modeling import LatentCache
from deepseek_v2_modeling.presets import build_model

PADS = 100
DOCUMENT = 1024


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, inputs: dict[str, Any]) -> dict[str, float]:
    start = time.perf_counter()
    with peak_of_memory() as peaks:
        model(input_ids=ids, logits_to_keep=1, **inputs)
    return {"seconds": round(time.perf_counter() - start, 1), "gb_above_weights": round(peaks[0], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    args = parser.parse_args()
    model: Any = build_model("v2-lite-mini", 0).to(torch.bfloat16).eval()
    ids = torch.randint(2, model.config.vocab_size, (1, args.tokens))
    mask = torch.ones_like(ids)
    mask[:, :PADS] = 0
    positions = torch.arange(args.tokens).unsqueeze(0)
    cases: dict[str, dict[str, Any]] = {
        "plain": {"use_cache": False},
        "with a cache": {"past_key_values": LatentCache(model.config)},
        f"{PADS} tokens of padding on the left": {"use_cache": False, "attention_mask": mask},
        f"packed documents of {DOCUMENT:,}": {"use_cache": False, "position_ids": positions % DOCUMENT},
    }
    figures = {}
    for name, inputs in cases.items():
        figures[name] = measure(model, ids, inputs)
        print(name, figures[name], flush=True)
    write("long_forward", {"tokens": args.tokens, "model": "v2-lite-mini", "dtype": "bf16", "cases": figures})


if __name__ == "__main__":
    main()
