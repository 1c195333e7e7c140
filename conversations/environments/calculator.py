"""An environment with a calculator."""

import ast
import operator
from collections.abc import Callable
from typing import Any

LONGEST = 200  # characters of an expression
LARGEST = 10**50  # of any result on the way
_SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def evaluate(expression: str) -> int | float:
    """The value of an arithmetic expression: numbers, + - * / // % **, and brackets.

    Raises:
        ValueError: it is anything else, too long, or a result on the way is not finite or beyond 10**50.
        ZeroDivisionError: it divides by zero.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters; at most {LONGEST} are allowed")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is not an arithmetic expression") from None
    return _value(tree.body)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _within(number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
            return _SIGNS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            a, b = _value(left), _value(right)
            if isinstance(op, ast.Pow) and abs(b) > 200:
                raise ValueError(f"the exponent {b} is beyond 200")
            return _within(_OPERATIONS[type(op)](a, b))
    raise ValueError("only numbers, + - * / // % ** and brackets are allowed")


def _within(number: Any) -> int | float:
    if isinstance(number, complex) or not abs(number) <= LARGEST:
        raise ValueError("the result is not a number within 10**50")
    return number


class Calculator:
    """A calculator, and nothing to remember."""

    def reset(self, **row: object) -> None:
        """Nothing to prepare."""

    def calculate(self, expression: str) -> str:
        """
        Compute an arithmetic expression exactly.

        Args:
            expression: numbers, + - * / // % ** and brackets, such as (12 + 3) * 4.

        Returns:
            The result.
        """
        return str(evaluate(expression))
