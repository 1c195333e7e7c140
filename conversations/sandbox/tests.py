"""Tests of a data set's row, prepared for guest/tester.py: parsed and rewritten here, run there."""

import ast
import builtins
from collections.abc import Sequence
from typing import NamedTuple

from conversations.errors import ToolkitError


class Tests(NamedTuple):
    """Source that is run one part after the other, and the names in it that are the candidate's. prompt: defines what
    the tests may use beside the candidate."""

    prompt: str
    setup: str
    tests: tuple[str, ...]
    names: tuple[str, ...]


def prepared(tests: Sequence[str], *, setup: str = "", prompt: str = "", entry_point: str | None = None) -> Tests:
    """Tests whose asserts are counted one by one.

    Raises:
        ToolkitError: a test that is no Python.
    """
    trees = {}
    for what, code in (("prompt", prompt), ("setup", setup), *((f"test {n}", test) for n, test in enumerate(tests, 1))):
        try:
            trees[what] = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ToolkitError(f"the {what} of a reference is not Python: {error}") from error
    of_prompt = trees.pop("prompt")
    names = {entry_point} if entry_point else _read(trees.values()) - _bound([of_prompt, *trees.values()])
    counted_setup, *counted = (ast.unparse(_Counted().visit(tree)) for tree in trees.values())
    return Tests(prompt, counted_setup, tuple(counted), tuple(sorted(names)))


class _Counted(ast.NodeTransformer):
    """Asserts that are counted, so that those behind a failed one count too. One that says nothing of the candidate
    (`assert True`) is left as it is."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        if isinstance(node.test, ast.Constant):
            return node
        source = repr(ast.unparse(node.test)[:200])
        (attempt,) = ast.parse(
            "try:\n    _passed = bool(...)\n"
            f"except Exception as _error:\n    _count(False, {source}, _error)\n"
            f"else:\n    _count(_passed, {source}, None)"
        ).body
        call = attempt.body[0].value  # pyright: ignore[reportAttributeAccessIssue]
        call.args[0] = node.test
        return attempt


def _read(trees: Sequence[ast.AST] | object) -> set[str]:
    """Names that are read, but for Python's own."""
    nodes = (node for tree in trees for node in ast.walk(tree))  # pyright: ignore
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - set(dir(builtins))


def _bound(trees: Sequence[ast.AST]) -> set[str]:
    """Names that get a value somewhere."""
    bound: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(name.asname or name.name).split(".")[0] for name in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return bound
