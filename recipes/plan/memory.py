"""The memory of a GPU, by what takes it, for a recipe on a given number of GPUs. In bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from deepseek_v2_modeling import DeepseekV2Config
from deepseek_v2_modeling.training import Activations, Sizes, Step, Weight, step_memory


class Layout(NamedTuple):
    """How many processes share the weights, and among how many of them experts are divided."""

    fsdp: int = 1
    ep: int = 1

    def __str__(self) -> str:
        sizes = f"fsdp: {self.fsdp}" + (f", ep: {self.ep}" if self.ep > 1 else "")
        return "null" if self.fsdp == 1 else f"{{{sizes}}}"

    def gathered(self, weight: Weight) -> float:
        """The share of a layer's weight that a process gathers: of experts, only its own."""
        return 1 / self.ep if weight.routed and not weight.adapter else 1


@dataclass(frozen=True)
class Rollouts:
    """Sampling between updates. settings: the recipe's section `rollout`; answers: side by side in a process, if memory
    allows; cache: bytes of one answer; adapted: whether there are adapters to merge into a copy of the weights."""

    settings: Any
    answers: int
    cache: int
    adapted: bool = False

    def parts(self, copied: int, free: float) -> dict[str, int]:
        """What a process takes of `free` bytes, as rl/rollouts/sampled.py decides. copied: bytes of a merged copy."""
        asked, merge = self.settings, self.settings.merge
        needed = copied + min(self.answers, asked.few) * self.cache
        copies = self.adapted and (merge if merge != "auto" else needed <= asked.merged_share * free)
        copied = copied if copies else 0
        limit = asked.cache_share * (free - copied) if asked.max_cache_gb is None else asked.max_cache_gb * 1e9
        cache = min(self.answers * self.cache, max(self.cache, int(limit)))
        return {"merged copy": copied, f"cache of {cache // self.cache:,} answers": cache}


@dataclass(frozen=True)
class Load:
    """What a recipe puts on its GPUs.

    moments: bytes of the optimizer's state for a trained value. float32: whether weights in float32 are computed with
    in low precision (full fine-tuning). reference: of the policy, shared like its weights. held: other models, by name.
    step: of one process.
    """

    settings: DeepseekV2Config
    sizes: Sizes
    step: Step
    moments: float
    float32: bool = False
    reference: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    rollouts: Rollouts | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU: what is always there, what an update adds, what rollouts add. unsaved: what activations would
    take without checkpointing; None if the recipe does without."""

    layout: Layout
    state: dict[str, int]
    update: dict[str, int]
    rollouts: dict[str, int]
    unsaved: int | None = None

    @property
    def total(self) -> int:
        """The most at one time."""
        return sum(self.state.values()) + max(sum(self.update.values()), sum(self.rollouts.values()))


def memory(load: Load, layout: Layout, room: float) -> Memory:
    """The memory of one GPU of a layout. room: bytes that the GPU has; rollouts take as many as are free."""
    step = load.step
    if layout.fsdp > 1:  # the gradients of a gathered layer are counted with it
        step = replace(step, accumulates=False)
    act = step_memory(load.settings, load.sizes, step)
    free = step_memory(load.settings, load.sizes, replace(step, checkpointing=False))
    shared = dict(_state(load)) | load.reference
    state = {part: size // layout.fsdp for part, size in shared.items()} | load.held
    update = {**_update(load, layout), **_exchange(load, layout)}
    update |= {"activations": act.saved, "logits, or a layer's backward pass": _worst(load, layout, act)}
    rollouts = _rollouts(load, layout, room - sum(state.values()))
    return Memory(layout, state, update, rollouts, free.saved if step.checkpointing else None)


def _worst(load: Load, layout: Layout, act: Activations) -> int:
    dequantized = (_dequantized(w, load) * layout.gathered(w) for w in load.sizes.weights if w.quantized)
    return max(act.head, act.layer + round(max(dequantized, default=0)))


def _state(load: Load) -> Iterator[tuple[str, int]]:
    """What is sharded and always there."""
    total = load.sizes.total
    yield "weights", total(_own_bytes, lambda weight: not weight.adapter)
    yield "adapters", total(_own_bytes, lambda weight: weight.adapter)
    yield "gradients", total(lambda weight: weight.trained * 4)
    yield "optimizer's state", total(lambda weight: weight.trained * load.moments)


def _own_bytes(weight: Weight) -> float:
    return weight.values * weight.itemsize


def _update(load: Load, layout: Layout) -> dict[str, int]:
    """Weights that an update holds beside its shards: gathered layers on several GPUs, and low-precision copies of
    float32 weights, which autocast makes."""
    low, sizes, parts = load.step.low, load.sizes, {}
    one_layer = layout.fsdp > 1 and load.step.checkpointing  # otherwise the backward pass needs those of all layers
    if layout.fsdp > 1:
        # The layer at work and the one fetched ahead, the head, and the gradients of a layer, twice while divided.
        layers = sizes.largest_unit(lambda w: layout.gathered(w) * (2 * _own_bytes(w) + 8 * w.trained))
        parts["gathered layers"] = layers + sizes.total(_own_bytes, lambda w: w.module in ("lm_head", "norm"))
    if load.float32 and low < 4:
        dense = (sizes.largest_unit if one_layer else sizes.total)(lambda w: w.trained * low * (not w.routed))
        parts["low-precision copies"] = dense + sizes.largest_unit(
            lambda w: layout.gathered(w) * w.trained * low * w.routed
        )
    return parts


def _dequantized(weight: Weight, load: Load) -> float:
    """Bytes that a product needs for the values of a quantised weight; on a CPU, those of one expert. For experts a
    copy of the codes is among them."""
    at_once = (load.settings.n_routed_experts or 1) if weight.routed and load.step.on_cpu else 1
    return weight.values * (load.step.low + weight.itemsize * weight.routed) / at_once


def _exchange(load: Load, layout: Layout) -> dict[str, int]:
    """Tokens on their way to experts of other processes and back, in three buffers, and their weighted outputs and
    gradients in float32. As many come as go if the load is even."""
    if layout.ep == 1:
        return {}
    values = load.step.tokens * (load.settings.num_experts_per_tok or 0) * load.settings.hidden_size
    return {"exchanged tokens": values * (3 * load.step.low + 8)}


def _rollouts(load: Load, layout: Layout, free: float) -> dict[str, int]:
    if load.rollouts is None:
        return {}
    low, sizes = load.step.low, load.sizes
    if layout.fsdp == 1:
        return load.rollouts.parts(_merged(sizes, low), free)
    gathered = 2 * sizes.largest_unit(_own_bytes)
    return {"layers gathered to sample": gathered, **replace(load.rollouts, adapted=False).parts(0, free - gathered)}


def _merged(sizes: Sizes, low: int) -> int:
    """Bytes of the weights that have adapters, merged; quantised ones are not."""
    adapted = {(w.unit, w.module.split(".lora_")[0]) for w in sizes.weights if w.adapter}

    def has_adapter(weight: Weight) -> bool:
        return not (weight.adapter or weight.quantized) and any(
            weight.unit == unit and f"{weight.module}.".startswith(f"{module}.") for unit, module in adapted
        )

    return sizes.total(lambda weight: weight.values * low, has_adapter)
