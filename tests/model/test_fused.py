"""What is compiled on a GPU: every such function as one graph, with the plain version's values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepseek_v2_modeling.kernels import expert_training
from deepseek_v2_modeling.kernels import fused as fused_file
from deepseek_v2_modeling.kernels.expert_training import gated_halves, gated_halves_gradient
from deepseek_v2_modeling.kernels.fused import fused
from deepseek_v2_modeling.kernels.grouped_products import (
    summed_slots,
    weighted_slots,
    weighted_slots_gradient,
    weighted_sum,
)
from deepseek_v2_modeling.kernels.row_blocks import row_blocks
from deepseek_v2_modeling.kernels.swiglu import gated
from deepseek_v2_modeling.layers.norm import weighted_norm
from deepseek_v2_modeling.layers.rope import rotated_pairs

TOKENS, TOP_K, WIDTH = 6, 3, 8
ROWS = TOKENS * TOP_K


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


PLACES = torch.arange(ROWS).flip(0).view(TOKENS, TOP_K)
CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "norm": (weighted_norm, (numbers(TOKENS, WIDTH), numbers(WIDTH, seed=1), 1e-6)),
    "rotary": (
        rotated_pairs,
        (numbers(1, 2, TOKENS, 4), numbers(1, TOKENS, 2).detach(), numbers(1, TOKENS, 2).detach()),
    ),
    "gate": (gated, (numbers(TOKENS, WIDTH), numbers(TOKENS, WIDTH, seed=1), nn.SiLU())),
    "gate of experts": (gated_halves, (numbers(ROWS, WIDTH).detach(), nn.SiLU(), numbers(ROWS, 1).detach())),
    "its gradient": (
        gated_halves_gradient,
        (numbers(ROWS, WIDTH).detach(), nn.SiLU(), numbers(ROWS, 1).detach(), numbers(ROWS, WIDTH // 2).detach()),
    ),
    "sum of slots": (summed_slots, (numbers(ROWS, WIDTH).detach(), PLACES)),
    "weighted sum of slots": (weighted_sum, (numbers(ROWS, WIDTH).detach(), PLACES, torch.rand(TOKENS, TOP_K))),
    "gradient of slots": (
        weighted_slots_gradient,
        (numbers(TOKENS, WIDTH).detach(), numbers(ROWS, WIDTH).detach(), PLACES.flatten() // TOP_K, torch.rand(ROWS)),
    ),
}


def values_and_gradients(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    out = function(*arguments)
    outs = list(out) if isinstance(out, tuple) else [out]
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    return outs + (list(torch.autograd.grad(outs[0].square().sum(), inputs)) if inputs else [])


@pytest.mark.parametrize("case", CASES)
def test_compiled_as_one_graph(case: str):
    function, arguments = CASES[case]
    torch.compiler.reset()
    compiled = torch.compile(function.__wrapped__, backend="aot_eager", fullgraph=True)
    wanted = values_and_gradients(function, arguments)
    for found, plain in zip(values_and_gradients(compiled, arguments), wanted, strict=True):
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU()], ids=str)
@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_gates_by_rows_are_those_of_all_rows(rows: int, activation: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expert_training, "IN_CACHE", 7 * WIDTH // 2)
    hidden, weights, g = (numbers(rows, n, seed=n).detach() for n in (WIDTH, 1, WIDTH // 2))
    for w in (None, weights):
        torch.testing.assert_close(
            expert_training.gate_rows(hidden, activation, w), gated_halves(hidden, activation, w), rtol=0, atol=0
        )
    found = expert_training.gate_rows_gradient(hidden, activation, weights, g)
    torch.testing.assert_close(found, gated_halves_gradient(hidden, activation, weights, g))


@given(rows=st.integers(0, 300), width=st.integers(0, 50), values=st.integers(1, 500))
def test_row_blocks_are_equal_and_as_few_as_there_can_be(rows: int, width: int, values: int):
    blocks = list(row_blocks(rows, width, values))
    assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))
    sizes = [block.stop - block.start for block in blocks]
    most = max(1, values // max(1, width))
    assert all(size <= most for size in sizes) and len(set(sizes[:-1])) <= 1
    assert len(sizes) <= -(-rows // most)


def test_the_weighted_sum_is_that_of_a_cpu():
    _, arguments = CASES["weighted sum of slots"]
    torch.testing.assert_close(weighted_sum(*arguments), weighted_slots(*arguments))


class OnGpu:
    """What `fused` asks of its first argument."""

    is_cuda = True

    def __init__(self, values: int):
        self.values = values

    def numel(self) -> int:
        return self.values


def test_few_values_run_as_they_come(monkeypatch: pytest.MonkeyPatch):
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or (lambda x: "compiled"))
    call: Any = fused(lambda x: "plain")
    assert call(OnGpu(fused_file.MANY - 1)) == call(torch.ones(fused_file.MANY)) == "plain" and not compiled
    assert [call(OnGpu(fused_file.MANY)) for _ in range(2)] == ["compiled"] * 2 and len(compiled) == 1


def test_a_process_that_trains_and_samples_stays_compiled(monkeypatch: pytest.MonkeyPatch):
    """It needs more versions of one function than torch's 8, beyond which torch would run it eagerly."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "compile", lambda function: lambda x: "compiled")
            fused(lambda x: "plain")(OnGpu(fused_file.MANY))
        compiled = torch.compile(weighted_norm.__wrapped__, backend="aot_eager")
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (TOKENS, TOKENS + 1):
                for trained, graded in ((True, True), (True, False), (False, True), (False, False)):
                    x = numbers(tokens, WIDTH).detach().to(dtype).requires_grad_(trained)
                    with torch.set_grad_enabled(graded):
                        compiled(x, torch.ones(WIDTH, dtype=dtype), 1e-6)


def test_without_a_compiler_it_runs_plainly(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def failing(x: Any) -> str:
        raise RuntimeError("Failed to find C compiler\nand more")

    tried: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: tried.append(function) or failing)
    said: list[str] = []
    monkeypatch.setattr(fused_file.logger, "warning_once", said.append)
    call: Any = fused(lambda x: "plain")
    assert [call(OnGpu(fused_file.MANY)) for _ in range(3)] == ["plain"] * 3
    assert len(tried) == 1 and said == [
        "kernels are not compiled on this GPU, which is slower: Failed to find C compiler"
    ]


def test_memory_that_runs_out_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch):
    answers: list[Any] = [torch.OutOfMemoryError("no"), "compiled"]

    def run(x: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(torch, "compile", lambda function: run)
    call: Any = fused(lambda x: "plain")
    with pytest.raises(torch.OutOfMemoryError):
        call(OnGpu(fused_file.MANY))
    assert call(OnGpu(fused_file.MANY)) == "compiled"
