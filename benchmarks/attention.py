"""Causal attention on a CPU, forward and backward: in blocks of queries (kernels/block_attention.py) and by torch's.

python -m benchmarks.attention       results/attention.json; about a minute on 2 cores

The sides run in turn, and the least of several rounds counts. Values are narrower than keys; torch's kernel gets them
padded, as in the model.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import write
from deepseek_v2_modeling.kernels.block_attention import block_attention
from recipes.process_settings import keep_freed_memory

# (rows, heads, tokens, width of keys, width of values)
SHAPES = (
    (128, 16, 32, 96, 64),
    (16, 16, 128, 96, 64),
    (8, 16, 256, 96, 64),
    (4, 16, 512, 96, 64),
    (1, 16, 2048, 96, 64),
)
DTYPES = (torch.bfloat16, torch.float32)
ROUNDS = 8
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def of_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    width = value.shape[-1]
    padded = F.pad(value, (0, query.shape[-1] - width))
    return F.scaled_dot_product_attention(query, key, padded, is_causal=True)[..., :width].transpose(1, 2)


def of_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return block_attention(nn.Identity(), query, key, value, None, query.shape[-1] ** -0.5)[0]


SIDES: dict[str, Attention] = {"torch": of_torch, "blocks": of_blocks}


def inputs(shape: Sequence[int], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(queries, keys and values; the gradient of the output)."""
    rows, heads, tokens, width, narrow = shape
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, heads, tokens, n, generator=generator).to(dtype) for n in (width, width, narrow)]
    return [t.requires_grad_() for t in parts], torch.randn(rows, tokens, heads, narrow, generator=generator).to(dtype)


def milliseconds(attend: Attention, parts: list[torch.Tensor], upstream: torch.Tensor) -> tuple[float, float]:
    """(forward, forward and backward) of one call."""
    start = time.perf_counter()
    out = attend(*parts)
    forward = time.perf_counter()
    torch.autograd.grad(out, parts, upstream)
    return (forward - start) * 1e3, (time.perf_counter() - start) * 1e3


def errors(attend: Attention, parts: list[torch.Tensor], upstream: torch.Tensor) -> list[float]:
    """Relative L2 errors of the output and of the gradients of queries, keys and values, against float64."""
    results = []
    for inputs in (parts, [t.detach().double().requires_grad_() for t in parts]):
        out = (attend if inputs is parts else of_torch)(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))])
    pairs = zip(*results, strict=True)
    return [float(f"{((found - exact).norm() / exact.norm()).item():.2g}") for found, exact in pairs]


def main() -> None:
    keep_freed_memory()  # as in `dsv2`
    figures: dict[str, Any] = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            parts, upstream = inputs(shape, dtype)
            rounds = [[milliseconds(side, parts, upstream) for side in SIDES.values()] for _ in range(2 + ROUNDS)][2:]
            of_side: dict[str, dict[str, Any]] = {}
            for (name, side), times in zip(SIDES.items(), zip(*rounds, strict=True), strict=True):
                forward, both = (round(min(of_round), 2) for of_round in zip(*times, strict=True))
                of_side[name] = {"forward_ms": forward, "both_ms": both, "errors": errors(side, parts, upstream)}
            key = f"{str(dtype).removeprefix('torch.')}, {' x '.join(map(str, shape))}"
            figures[key] = of_side
            print(key, of_side, flush=True)
    write("attention", figures)


if __name__ == "__main__":
    main()
