"""Shared by the benchmarks: timing, the description of the machine, and writing of results."""

import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MINI: dict[str, Any] = {  # a small V2-Lite
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "moe_intermediate_size": 256,
    "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy",
    "max_position_embeddings": 16384, "pad_token_id": 0,
}  # fmt: skip
PACKAGES = ("torch", "transformers", "peft")
BF16_FLAGS = {"amx_bf16": "with AMX", "avx512_bf16": "without AMX, with AVX-512 bf16"}  # of /proc/cpuinfo, best first


def seconds(run: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
    """Median seconds of a call."""
    times = []
    for index in range(warm_up + repeats):
        start = time.perf_counter()
        run()
        if index >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory_gb(field: str) -> float:
    """Memory of this process: RssAnon (anonymous, current) or VmHWM (peak resident)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e9


@contextmanager
def peak_of_memory() -> Iterator[list[float]]:
    """Yields a list of one entry: the peak of anonymous memory in the block above that at its start, in GB."""
    before, stopped, peaks = memory_gb("RssAnon"), threading.Event(), [0.0]

    def watch() -> None:
        while not stopped.wait(0.005):
            peaks[0] = max(peaks[0], memory_gb("RssAnon") - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        stopped.set()
        watcher.join()


def memory_bandwidth() -> float:
    """Bytes per second when reading a large array."""
    data = torch.ones(2**28, dtype=torch.uint8).view(torch.int64)
    return data.numel() * 8 / seconds(data.sum)


def matrix_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of a large square matrix product."""
    a = torch.randn(n, n, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ a)


def processor() -> str:
    """The CPU's name and its instructions for bf16 products, which determine their speed."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    with_bf16 = next((label for flag, label in BF16_FLAGS.items() if flag in text), "without AMX")
    return f"{names[0] if names else platform.processor()}, {with_bf16}"


def conditions() -> dict[str, Any]:
    """Date, machine and versions, stored in every results file."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
        "memory_gb_per_s": round(memory_bandwidth() / 1e9, 2),
        "matrix_tflops": {
            "bf16": round(matrix_rate(torch.bfloat16) / 1e12, 3),
            "fp32": round(matrix_rate(torch.float32) / 1e12, 3),
        },
    }


def write(name: str, figures: dict[str, Any]) -> None:
    """Writes results/NAME.json, with the conditions."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**conditions(), **figures}, indent=1) + "\n")
    print(f"written: {path}")


def plot(name: str, title: str, axes: tuple[str, str], curves: dict[str, Sequence[tuple[float, float]]]) -> None:
    """Writes results/NAME.png: curves of (x, y) on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), dpi=120)
    for label, points in curves.items():
        ax.plot(*zip(*points, strict=True), marker="o", label=label)
    ax.set(title=title, xlabel=axes[0], ylabel=axes[1], xscale="log", yscale="log")
    ax.grid(True, which="both", alpha=0.3)
    ax.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png")
    plt.close(figure)
