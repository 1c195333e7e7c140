"""Which layouts a recipe can run on, and the one with the fewest GPUs that it fits on."""

from collections.abc import Iterator
from math import gcd

from recipes.plan.memory import Layout, Load, Memory, memory

USABLE = 0.92  # of a GPU's memory: the rest goes to CUDA's context, NCCL's buffers and gaps between blocks
NODE = 8  # GPUs
MOST = 1024
SIZES = (1, 2, 4, *range(NODE, MOST + 1, NODE))


def layouts(experts: int | None) -> Iterator[Layout]:
    """Those to try, in order. experts: of the model, which are divided within a machine at most: tokens that are sent
    between machines at every layer take long."""
    for size in SIZES:
        yield Layout(size)
        if (ep := gcd(experts or 1, NODE, size)) > 1:
            yield Layout(size, ep)


def fits(needed: Memory, gpu_bytes: float) -> bool:
    """Whether it leaves room for what is not counted."""
    return needed.total <= USABLE * gpu_bytes


def smallest(load: Load, gpu_bytes: float) -> Memory | None:
    """The memory on the fewest GPUs that are enough; None if even MOST are not."""
    needed = (memory(load, layout, USABLE * gpu_bytes) for layout in layouts(load.settings.n_routed_experts))
    return next((found for found in needed if fits(found, gpu_bytes)), None)
