"""What the benchmarks share: timing, the machine's description, and where results go."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft")


def seconds(run: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
    """Median seconds of a call."""
    times = []
    for index in range(warm_up + repeats):
        start = time.perf_counter()
        run()
        if index >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory_bandwidth() -> float:
    """Bytes a second that a read of a large array reaches."""
    data = torch.ones(2**28, dtype=torch.uint8).view(torch.int64)
    return data.numel() * 8 / seconds(data.sum)


def matrix_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of a large square matrix product."""
    a = torch.randn(n, n, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ a)


def processor() -> str:
    """The CPU's name and whether it has AMX, which decides what bf16 costs."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {'with' if 'amx_bf16' in text else 'without'} AMX"


def conditions() -> dict[str, Any]:
    """Date, machine and versions, for every file of results."""
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
    """results/NAME.json, with the conditions."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**conditions(), **figures}, indent=1) + "\n")
    print(f"written: {path}")


def plot(name: str, title: str, axes: tuple[str, str], curves: dict[str, Sequence[tuple[float, float]]]) -> None:
    """results/NAME.png: curves of (x, y) on logarithmic axes."""
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
