"""Seconds of attention at lengths that were seen before and at new ones, by backend: packed documents bring new lengths
in each step, and a library that plans for each shape pays then.

    python -m benchmarks.gpu.new_lengths [--device cuda]

Same requirements as check.py. Queries and keys of 16 heads of 192 values, as in V2-Lite, causal, with gradients.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "torch's choice": None,
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "cuDNN": [SDPBackend.CUDNN_ATTENTION],
}


def seconds(device: str, length: int) -> float:
    """Of forward and backward of 4 rows."""
    q, k, v = (torch.randn(4, 16, length, 192, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    wait()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    lengths = [97 + 13 * n for n in range(24 if device == "cuda" else 3)]
    for name, backends in BACKENDS.items():
        with sdpa_kernel(backends) if backends else nullcontext():
            try:
                seconds(device, 64)  # loads the kernels
                new, known = ([seconds(device, length) for length in lengths] for _ in range(2))
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0]}")
                continue
        first, again = (statistics.median(times) * 1e3 for times in (new, known))
        print(f"{name}: median {first:.2f} ms new, {again:.2f} ms known")


if __name__ == "__main__":
    main()
