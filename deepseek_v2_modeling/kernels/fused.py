"""Chains of elementwise operations, as one kernel each where there are many values on a GPU.

As they come, each of them reads and writes all values: in a step of V2-Lite they took more time than all matrix
products (docs/speed.md). Where nothing can be compiled they run as they come, and that is said once.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANY = 2**20  # values; fewer, as in a decode step, do not pay for looking up what was compiled


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """A pure function of tensors, compiled when its first argument has MANY values on a GPU."""
    compiled: Callable[..., Any] | None = None

    @wraps(function)
    def call(x: torch.Tensor, *args: Any) -> Any:
        nonlocal compiled
        if not x.is_cuda or x.numel() < MANY or torch.compiler.is_compiling() or compiled is function:
            return function(x, *args)
        if compiled is not None:
            return compiled(x, *args)
        compiled = torch.compile(function)  # here, not above: it imports half a second's worth
        try:
            return compiled(x, *args)
        except torch.OutOfMemoryError:  # says nothing of the compiler
            compiled = None
            raise
        except Exception as error:  # no Triton, no C compiler, an old driver
            compiled = function
            logger.warning_once(f"kernels are not compiled on this GPU, which is slower: {str(error).splitlines()[0]}")
            return function(x, *args)

    return call
