"""How many processes share the weights, and what `accelerate launch` was told about it."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ModelError

# Variables by which `accelerate launch` says that it shards weights, and their values, as accelerate reads them.
LAUNCHERS = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
_TRUE = ("1", "true", "yes", "y", "t", "on")


def launched_sharding() -> str | None:
    """What `accelerate launch` was told to shard weights by: FSDP, DeepSpeed, or None."""
    return next((name for name, key in LAUNCHERS.items() if os.environ.get(key, "").lower() in _TRUE), None)


@dataclass(frozen=True)
class Parallel:
    """fsdp: processes that share the weights; further ones hold copies. ep: of these, processes among which the experts
    of each layer are divided; it divides fsdp."""

    fsdp: int
    ep: int = 1

    def check(self, processes: int) -> None:
        """Raise ModelError unless this many processes can be divided so."""
        if processes % self.fsdp:
            sizes = _divisors(processes)
            there = f"there are {processes} processes" if processes > 1 else "there is one process"
            raise ModelError(
                f"parallel.fsdp is {self.fsdp} and {there}, which it must divide: "
                + (f"use {_listed(sizes)}, or " if sizes else "")
                + f"start {self.fsdp} or a multiple of that: --processes {self.fsdp}"
            )

    def check_experts(self, experts: int | None) -> None:
        """Raise ModelError unless a model's routed experts can be divided so."""
        if self.ep == 1:
            return
        if not experts:
            raise ModelError(f"parallel.ep is {self.ep} and this model has no routed experts; leave it out")
        if experts % self.ep:
            sizes = [size for size in _divisors(self.fsdp) if experts % size == 0]
            raise ModelError(
                f"parallel.ep is {self.ep} and the model has {experts} routed experts, which it must divide: "
                + (f"use {_listed(sizes)}" if sizes else f"no size does that divides parallel.fsdp {self.fsdp} too")
                + ", or leave it out"
            )


def _divisors(number: int) -> list[int]:
    return [size for size in range(2, number + 1) if number % size == 0]


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))
