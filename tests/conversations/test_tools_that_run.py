"""The tools that ship: a calculator that computes exactly, and Python programs in the sandbox."""

import asyncio
import os
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations.environments import Calculator, PythonSandbox
from conversations.environments.loading import load_environment
from conversations.environments.python_sandbox import shortened
from conversations.errors import ToolkitError
from conversations.sandbox.box import why_unavailable

WHY = why_unavailable()
NUMBERS = st.integers(-(10**12), 10**12)


@given(a=NUMBERS, b=NUMBERS, c=st.integers(1, 10**6))
def test_the_calculator_is_exact(a: int, b: int, c: int):
    found = int(Calculator().calculate(f" ({a} + {b}) * {c} - {a} // {c} "))
    assert found == (a + b) * c - a // c
    quotient = float(Calculator().calculate(f"{a} / {c}"))
    assert quotient == float(Fraction(a, c))


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "10**60", "1e60", "1e400 - 1e400", "(-8)**0.5", "__import__('os')", "True", "1j", "'a' * 3", "x", "",
     "1 +", "1\n2", "1 if 1 else 2", "(" * 150, "1" * 201, "2**(10**10)", "0/0", "[1]", "1 << 400"],
)  # fmt: skip
def test_the_calculator_refuses_the_rest(expression: str):
    with pytest.raises((ValueError, ZeroDivisionError)):
        Calculator().calculate(expression)


PROGRAMS = [
    ("print(6 * 7)", "42"),
    ("pass", "(it printed nothing)"),
    ("def f():\n    return 1 / 0\n\nf()", "ZeroDivisionError: division by zero"),
    ("x =", "SyntaxError: invalid syntax"),
    ("import sys\nprint('a')\nsys.exit(3)", "a\nthe program ended with exit code 3"),
    ("print('b', flush=True)\nwhile True: pass", "b\nnot done after 1 s"),
    ("print('c' * 500)", "c" * 50 + "\n... (400 characters left out) ...\n" + "c" * 50),
]


@pytest.mark.parametrize("isolated", [True, False])
def test_programs_run(isolated: bool):
    if isolated and WHY is not None and os.environ.get("DSV2_TEST_SANDBOX") != "1":
        pytest.skip(WHY)
    sandbox = PythonSandbox(seconds=1, characters=100, allow_unsandboxed=not isolated)

    async def run() -> list[str]:
        return await asyncio.gather(*(sandbox.run_python(code) for code, _ in PROGRAMS))

    for said, (_, wanted) in zip(asyncio.run(run()), PROGRAMS, strict=True):
        assert said.endswith(wanted) and "candidate.py" not in said


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"seconds": 0}, "seconds must be a number from 1"),
        ({"memory": "much"}, "memory must be"),
        ({"characters": True}, "characters must be"),
        ({"allow_unsandboxed": 1}, "allow_unsandboxed must be true or false"),
    ],
)
def test_a_sandbox_refuses_its_settings(settings: dict[str, object], why: str):
    with pytest.raises(ToolkitError, match=why):
        load_environment("conversations.environments:PythonSandbox", settings).instance()


@pytest.mark.skipif(WHY is None, reason="this machine has a sandbox")
def test_without_a_sandbox_there_is_one_message():
    with pytest.raises(ToolkitError, match="runs in a sandbox, which is not available on this machine"):
        PythonSandbox()


@given(text=st.text(max_size=60), longest=st.integers(1, 30))
def test_what_is_left_out_is_counted(text: str, longest: int):
    found = shortened(text, longest)
    assert found == text if len(text) <= longest else f"({len(text) - longest} characters left out)" in found
