"""GPU time of a LoRA step of V2-Lite and of its prefill, by kernel.

    python -m benchmarks.gpu.kernel_times

Same requirements as check.py. Prints the seconds of each, the rate compared with a large matrix product, and the
slowest kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.check import Bench, DeepseekV2Config, LatentCache, adapted, step_flops, training_step

BATCH, CONTEXT = 4, 1024
ROWS = 40  # per table


def report(bench: Bench, name: str, run: Callable[[], Any]) -> float:
    """Prints the kernels of one call; gives its median seconds without the profiler."""
    seconds = bench.seconds(run)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        bench.wait()
    print(f"{name}: {seconds:.4f} s")
    print(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=ROWS, max_name_column_width=70))
    return seconds


def main() -> None:
    bench = Bench("cuda")
    model, trained = adapted(bench.large(), ours=True)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    seconds = report(bench, "LoRA step", partial(training_step, model, optimizer, bench.ids(BATCH, CONTEXT)))
    flops = step_flops(bench.config(DeepseekV2Config), BATCH * CONTEXT, CONTEXT)
    print(
        f"{BATCH * CONTEXT / seconds:,.0f} tokens/s, {flops / seconds / bench.matrix_rate():.1%} of the matrix rate\n"
    )
    model, ids = model.unload().eval(), bench.ids(8, 2048)
    with torch.no_grad():
        keywords = {"use_cache": True, "logits_to_keep": 1}
        report(bench, "prefill of 8 x 2,048", lambda: model(ids, past_key_values=LatentCache(model.config), **keywords))


if __name__ == "__main__":
    main()
