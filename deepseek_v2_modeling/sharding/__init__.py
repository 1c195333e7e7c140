"""Models whose weights are shared among processes, by FSDP2 and expert parallelism; see model.py."""

from .contact import PATIENCE, LostContact, at, wait_at_most
from .in_step import in_step
from .layout import Parallel, launched_sharding
from .model import (
    FROM_FIRST,
    PARTLY,
    as_if_whole,
    base_of,
    frozen_copy,
    is_sharded,
    read_weights,
    reshard,
    shard,
    whole,
    whole_state,
)

__all__ = [
    "FROM_FIRST",
    "PARTLY",
    "PATIENCE",
    "LostContact",
    "Parallel",
    "as_if_whole",
    "at",
    "base_of",
    "frozen_copy",
    "in_step",
    "is_sharded",
    "launched_sharding",
    "read_weights",
    "reshard",
    "shard",
    "wait_at_most",
    "whole",
    "whole_state",
]
