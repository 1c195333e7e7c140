"""The lines that `dsv2 plan` prints."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from conversations.sections import TrainingRecipe
from recipes.plan.compute import flops_per_token, seconds
from recipes.plan.layouts import MOST, USABLE, fits
from recipes.plan.load import Lengths, answer_length, sequences_per_batch
from recipes.plan.measure import Plan
from recipes.plan.memory import Layout, Load, Memory
from recipes.runs.training_fields import setting

GB = 1e9
HOUR = 3600


@dataclass(frozen=True)
class Gpu:
    """gb: memory in 10^9 bytes; teraflops: peak in the dtype of training; mfu: the share of it that training uses."""

    gb: float = 80.0
    teraflops: float = 989.0
    mfu: float = 0.3


def weights_line(load: Load) -> str:
    """How many weights there are, how many work on a token, and how many are trained."""
    total, trained = load.sizes.total(lambda w: w.values), load.sizes.total(lambda w: w.trained)
    settings = load.settings
    share = (settings.num_experts_per_tok or 0) / (settings.n_routed_experts or 1)
    active = load.sizes.total(lambda w: w.values * (share if w.routed else 1))
    return f"weights: {_count(total)}, {_count(active)} of them active for a token; trained: {_count(trained)}"


def memory_table(columns: Sequence[Memory]) -> Iterator[str]:
    """What takes the memory of a GPU, in GB, a column for each layout."""
    heads = [_layout(m.layout) for m in columns]
    names = list(dict.fromkeys(name for m in columns for part in (m.state, m.update, m.rollouts) for name in part))
    width = max(map(len, [*names, _UNSAVED, _HEAD]))
    widths = [max(len(head), 8) for head in heads]

    def row(name: str, cells: Sequence[str]) -> str:
        return f"  {name:<{width}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))

    yield row(_HEAD, heads)
    for title, part in (("always", "state"), ("in an update", "update"), ("in a rollout", "rollouts")):
        parts = [getattr(m, part) for m in columns]
        own = [name for name in names if any(p.get(name) for p in parts)]
        if own:
            yield f" {title}"
        for name in own:
            yield row(name, [_gb(p.get(name, 0)) for p in parts])
    total = "total (the larger of the two)" if any(m.rollouts for m in columns) else "total"
    yield row(total, [_gb(m.total) for m in columns])
    if any(m.unsaved for m in columns):
        yield row(_UNSAVED, [_gb(m.unsaved or 0) for m in columns])


_HEAD = "GB (10^9 bytes) on each GPU"
_UNSAVED = "activations without checkpointing"


def _layout(layout: Layout) -> str:
    return "1 GPU" if layout == Layout() else str(layout).strip("{}")


def verdict(found: Memory | None, own: Memory, gpu: Gpu) -> Iterator[str]:
    """Whether it fits as the recipe is, and on how many GPUs it does."""
    room = f"{USABLE:.0%} of a GPU of {gpu.gb:g} GB"
    if fits(own, gpu.gb * GB):
        yield f"fits: {_gb(own.total)} GB a GPU is within {room}"
        return
    where = "one GPU" if own.layout.fsdp == 1 else f"parallel: {own.layout}"
    yield f"does not fit on {where}: {_gb(own.total)} GB is more than {room}"
    if found is None:
        yield f"it does not fit on {MOST:,} GPUs either: train fewer weights (lora), or shorter or fewer sequences"
    else:
        yield f"fits on {found.layout.fsdp} GPUs: parallel: {found.layout} takes {_gb(found.total)} GB a GPU"
    if own.unsaved is None:
        yield "training.gradient_checkpointing: true would take less memory for activations"


def step_lines(
    recipe: TrainingRecipe, load: Load, lengths: Lengths, gpus: int, gpu: Gpu, plan: Plan | None
) -> Iterator[str]:
    """Tokens, operations and time of a step, and of the run if its length is known."""
    length = lengths.of_row(recipe)
    sequences = sequences_per_batch(recipe) * setting(recipe, "gradient_accumulation_steps") * gpus
    tokens = sequences * length
    flops = tokens * flops_per_token(load.settings, load.sizes, length)
    time = seconds(flops, gpus, gpu.teraflops, gpu.mfu)
    speed = f"{gpu.mfu:.0%} of {gpu.teraflops:g} TFLOP/s"
    yield (
        f"a step on {_gpus(gpus)}: {sequences:,} sequences of up to {length:,} tokens, {_count(tokens)} tokens; "
        f"{flops:.3g} FLOPs; {_time(time)} at {speed} a GPU"
    )
    if plan is not None:
        yield f"the run: {plan.steps:,} steps, at most {_count(tokens * plan.steps)} tokens, {_time(time * plan.steps)}"
    else:
        yield f"its rows were not counted: 1 billion tokens take {_time(time / tokens * 1e9)}"
    if answer_length(recipe):
        yield "sampling is not in these times: reading weights and cache limits it, not FLOPs"


def _time(seconds: float) -> str:
    return f"{seconds / HOUR:,.3g} hours" if seconds >= HOUR else f"{seconds:.3g} s"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count:,} GPUs"


def _gb(size: float) -> str:
    return f"{size / GB:,.1f}" if size >= 0.1 * GB or not size else f"{size / GB:.2g}"


def _count(number: float) -> str:
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"
