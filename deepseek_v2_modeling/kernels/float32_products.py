"""Matrix products of low-precision tensors on CPUs where low precision is slow.

Some CPUs multiply bf16 at half the rate of float32, others (with AMX, or AVX-512's bf16 products) at four to eight
times that rate (docs/speed.md), so the rates are measured. Where float32 is faster, products of at least ROWS rows run
in float32 on pieces of the weights that fit into the CPU's cache, and the results are rounded: the same as a
low-precision kernel that accumulates in float32, but faster.
"""

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

STEADY = 32  # rows
WORTH_ONEDNN = 2**22  # multiplications: 85 us in MKL
ROWS = 64  # from this many rows on, the faster product makes up for converting the weights
PIECE = 2**20  # weights converted at a time: 4 MiB in float32
TOKENS = 2048  # rows converted at a time
MEASURED = (256, 1024, 1024)  # rows, inputs and outputs of the product whose rate is measured
REPEATS = 3


@cache
def float32_is_faster(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether this CPU multiplies float32 faster than a low-precision dtype; measured once per process (0.1 s).

    No known CPU has nearly equal rates, so a resumed run chooses as the first one did.
    """
    return product_seconds(torch.float32) < product_seconds(dtype)


@torch.no_grad()
def product_seconds(dtype: torch.dtype) -> float:
    """CPU time of a matrix product in one thread, in seconds, the least of REPEATS. On a busy machine the time on the
    clock, or that of several threads that wait for one another, would say how busy it is."""
    rows, inputs, outputs = MEASURED
    x_NI = torch.ones(rows, inputs, dtype=dtype, device="cpu")
    w_OI = torch.ones(outputs, inputs, dtype=dtype, device="cpu")
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autocast("cpu", enabled=False):
            torch.mm(x_NI, w_OI.t())  # creates oneDNN's primitive
            for _ in range(REPEATS):
                start = time.thread_time()
                torch.mm(x_NI, w_OI.t())
                seconds.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(seconds)


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL, which torch uses: on AMD's CPUs with AVX-512, twice as fast,
    since MKL goes no further than AVX2 there."""
    info = Path("/proc/cpuinfo")
    amd = info.is_file() and "AuthenticAMD" in info.read_text()
    return amd and torch.cpu._is_avx512_supported() and torch.backends.mkldnn.is_available()


def prefers_onednn(x: torch.Tensor) -> bool:
    """Whether oneDNN is the faster library for products with x."""
    plain = x.device.type == "cpu" and compute_dtype(x) == torch.float32
    return plain and not torch.compiler.is_compiling() and onednn_is_faster()


def by_onednn(x: torch.Tensor) -> bool:
    """Whether products with x run in oneDNN, outside autograd, which does not know its function."""
    return not torch.is_grad_enabled() and prefers_onednn(x)


def onednn_product(x_NI: torch.Tensor, w_OI: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w^T in float32, for a contiguous x; into `out` if given. For each new shape oneDNN makes a primitive, in
    about 0.6 ms: rows beyond a multiple of STEADY are left to MKL, so that there are few. So are small products: a call
    of oneDNN takes 11 us longer."""
    steady = len(x_NI) - len(x_NI) % STEADY if x_NI.numel() * len(w_OI) >= WORTH_ONEDNN else 0
    if not steady:
        return torch.mm(x_NI, w_OI.t(), out=out)
    y = torch.ops.mkldnn._linear_pointwise(x_NI[:steady], w_OI, None, "none", [], "")
    if out is None and steady == len(x_NI):
        return y
    out = x_NI.new_empty(len(x_NI), len(w_OI)) if out is None else out
    out[:steady] = y
    torch.mm(x_NI[steady:], w_OI.t(), out=out[steady:])
    return out


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products on x: autocast's if enabled, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rounds_apart(x: torch.Tensor) -> bool:
    """Whether what is computed from x without gradients, on a CPU, would be rounded to low precision in another way if
    products had other shapes: a difference of one bit early on becomes one of the size of all rounding errors."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and compute_dtype(x).itemsize < 4


def fastest_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which small products with x are fastest on its device: float32 or x's own."""
    low = x.device.type == "cpu" and x.dtype.itemsize < 4
    return torch.float32 if low and float32_is_faster(x.dtype) else x.dtype


def widens(x: torch.Tensor, rows: int) -> bool:
    """Whether a product of `rows` rows of x runs in float32 although its result is low-precision."""
    if x.device.type != "cpu" or rows < ROWS or torch.compiler.is_compiling():
        return False
    dtype = compute_dtype(x)
    return dtype.itemsize < 4 and float32_is_faster(dtype)


def _pieces(w_OI: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(slice of rows, those rows of w in float32), PIECE weights at a time."""
    step = max(1, PIECE // w_OI.shape[1])
    for start in range(0, w_OI.shape[0], step):
        rows = slice(start, start + step)
        yield rows, w_OI[rows].float()


class _OnednnLinear(torch.autograd.Function):
    """x @ w^T in float32. The weight's gradient is MKL's: oneDNN would copy both of its factors first."""

    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[1] else None, w_OI)
        return onednn_product(x_NI, w_OI)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_NI, w_OI), g_NO = ctx.saved_tensors, grads[0].contiguous()
        dx = onednn_product(g_NO, w_OI.t()) if ctx.needs_input_grad[0] else None
        return dx, torch.mm(g_NO.t(), x_NI) if ctx.needs_input_grad[1] else None


class _WideLinear(torch.autograd.Function):
    """x @ w^T + bias in float32, rounded to `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, x_NI: torch.Tensor, w_OI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[2] else None, w_OI)
        ctx.x_dtype, ctx.bias_dtype = x_NI.dtype, None if bias_O is None else bias_O.dtype
        y_NO = x_NI.new_empty(x_NI.shape[0], w_OI.shape[0], dtype=dtype)
        with torch.autocast("cpu", enabled=False):
            for x, y in zip(x_NI.split(TOKENS), y_NO.split(TOKENS), strict=True):
                wide = x.float()
                for rows, w in _pieces(w_OI):
                    part = torch.mm(wide, w.t())
                    y[:, rows] = part if bias_O is None else part.add_(bias_O[rows])
        return y_NO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, w_OI = ctx.saved_tensors
        g_NO = grads[0].float()
        dx = dw = db = None
        if ctx.needs_input_grad[1]:
            dx = g_NO.new_zeros(g_NO.shape[0], w_OI.shape[1])
            for rows, w in _pieces(w_OI):
                dx.addmm_(g_NO[:, rows], w)
            dx = dx.to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            dw = torch.mm(g_NO.t(), x_NI.float()).to(w_OI.dtype)
        if ctx.needs_input_grad[3]:
            db = g_NO.sum(0).to(ctx.bias_dtype)
        return None, dx, dw, db


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is a plain tensor, not a subclass such as torchao's quantised ones."""
    return type(weight) in (torch.Tensor, nn.Parameter)


class WideLinear(nn.Linear):
    """nn.Linear that computes and returns float32, regardless of autocast and of the weight's and input's dtypes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


class Linear(nn.Linear):
    """nn.Linear that uses float32 products where they are faster.

    Inputs are made contiguous: given a three-dimensional slice or a transposed or expanded view, and a frozen weight,
    torch runs a batched product, for which it copies the weight once per batch row.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input = input.contiguous()
        if self.bias is None and prefers_onednn(input) and is_plain(self.weight) and self.weight.dtype == input.dtype:
            product = _OnednnLinear.apply if torch.is_grad_enabled() else onednn_product
            return product(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])
        if not (widens(input, input.shape[:-1].numel()) and is_plain(self.weight)):
            return super().forward(input)
        y_NO = _WideLinear.apply(compute_dtype(input), input.flatten(0, -2), self.weight, self.bias)
        return y_NO.unflatten(0, input.shape[:-1])
