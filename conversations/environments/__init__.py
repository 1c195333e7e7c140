"""Environments that models act in by calling tools, by the protocol of TRL's `environment_factory`, and two that ship:
`conversations.environments:Calculator` and `conversations.environments:PythonSandbox`."""

from conversations.environments.calculator import Calculator
from conversations.environments.python_sandbox import PythonSandbox

__all__ = ["Calculator", "PythonSandbox"]
