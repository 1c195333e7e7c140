"""Sampling from shared weights: processes run forwards together, although their answers end at different lengths."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .model import base_of, is_sharded


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Context for forwards without gradients, of which each process runs as many as it needs; every process has to
    enter it.

    A forward gathers weights, and exchanges tokens with experts, in which all processes must take part. So each one
    announces a forward before it runs it, and whoever is done runs forwards on a single token for as long as others
    announce theirs.
    """
    if not is_sharded(model):
        yield
        return
    base = base_of(model)
    device = next(base.parameters()).device
    announced = base.register_forward_pre_hook(lambda *_: _announce(True, device) and None, prepend=True)
    try:
        yield
    finally:
        announced.remove()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        while _announce(False, device):
            base(token, use_cache=False)


def _announce(works: bool, device: torch.device) -> bool:
    """Whether any process is about to run a forward."""
    count = torch.tensor([float(works)], device=device)
    dist.all_reduce(count)
    return count.item() > 0
