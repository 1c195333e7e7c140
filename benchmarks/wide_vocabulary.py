"""Time and memory of the first token of a few prompts, on a frozen model with the released vocabulary (102,400).

If the input is a 3-D slice, such as the last token's hidden state, torch copies a frozen weight once per row of the
batch. Stock transformers copies its LM head this way.

    python -m benchmarks.wide_vocabulary
"""

from typing import Any

import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as stock

from deepseek_v2_modeling import DeepseekV2Config, DeepseekV2ForCausalLM

from .common import MINI, peak_of_memory, processor, seconds

SHAPE: dict[str, Any] = {
    **MINI, "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 2, "first_k_dense_replace": 2,
}  # fmt: skip
PROMPTS, TOKENS = 6, 32


def build(cls: Any, dtype: torch.dtype) -> Any:
    """A frozen random model of the class, created in this dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return cls(DeepseekV2Config(**SHAPE)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def main() -> None:
    print(processor(), f"{torch.get_num_threads()} threads; {PROMPTS} prompts of {TOKENS} tokens", sep="; ")
    ids = torch.randint(2, SHAPE["vocab_size"], (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32):
        for name, cls in (("ours", DeepseekV2ForCausalLM), ("stock", stock.DeepseekV2ForCausalLM)):
            model = build(cls, dtype)
            with torch.no_grad(), peak_of_memory() as peak:
                took = seconds(lambda model=model: model(input_ids=ids, logits_to_keep=1), repeats=3, warm_up=1)
            print(f"{dtype!s:<16} {name:<6} {took:>8.2f} s {peak[0]:>8.2f} GB more", flush=True)
            del model


if __name__ == "__main__":
    main()
