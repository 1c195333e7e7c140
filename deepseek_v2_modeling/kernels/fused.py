"""Fuses chains of elementwise operations into one kernel with torch.compile, for large tensors on a GPU.

Run eagerly, each operation reads and writes all values: in a training step of V2-Lite they took more time than all
matrix products (docs/speed.md). If compilation fails they run eagerly, with one warning.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.compiler import config as settings
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANY = 2**20  # values; for fewer, as in a decode step, dispatching to the compiled code costs more than it saves
# Of one function: dtypes, grad mode, whether x and the weight have gradients, numbers of dimensions, first a fixed
# shape and then any. A process that trains, samples and evaluates needs more than torch's 8; beyond, it runs eagerly.
VERSIONS = 64


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a pure function of tensors, compiled when its first argument is on a GPU and has at least MANY
    values."""
    compiled: Callable[..., Any] | None = None

    @wraps(function)
    def call(x: torch.Tensor, *args: Any) -> Any:
        nonlocal compiled
        if not x.is_cuda or x.numel() < MANY or torch.compiler.is_compiling() or compiled is function:
            return function(x, *args)
        if compiled is not None:
            return compiled(x, *args)
        compiled = torch.compile(function)  # not at decoration time: its imports take half a second
        settings.recompile_limit = max(settings.recompile_limit, VERSIONS)
        try:
            return compiled(x, *args)
        except torch.OutOfMemoryError:  # not a failure of the compiler
            compiled = None
            raise
        except Exception as error:  # no Triton, no C compiler, an old driver
            compiled = function
            logger.warning_once(f"kernels are not compiled on this GPU, which is slower: {str(error).splitlines()[0]}")
            return function(x, *args)

    return call
