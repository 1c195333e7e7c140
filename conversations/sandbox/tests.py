"""Prepares the tests of a row for guest/tester.py, which runs them: parses and rewrites them."""

import ast
import builtins
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from conversations.errors import ToolkitError

_PARSING = threading.Lock()


def parsed(source: str) -> ast.Module:
    """ast.parse, one thread at a time: its depth counter is shared, and with several threads Python 3.11 occasionally
    raises SystemError."""
    with _PARSING:
        return ast.parse(source)


class Tests(NamedTuple):
    """Source parts that run in order, and the names in them that the candidate defines. prompt: defines what the tests
    may use besides the candidate. counted: whether there are asserts to count."""

    prompt: str
    setup: str
    tests: tuple[str, ...]
    names: tuple[str, ...]
    counted: bool

    @property
    def task(self) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
        """The message for guest/tester.py."""
        return self[:4]


def prepared(tests: Sequence[str], *, setup: str = "", prompt: str = "", entry_point: str | None = None) -> Tests:
    """Prepares tests so that their asserts are counted one by one.

    Raises:
        ToolkitError: a test is not Python.
    """
    trees = {}
    for part, code in (("prompt", prompt), ("setup", setup), *((f"test {n}", test) for n, test in enumerate(tests, 1))):
        try:
            trees[part] = parsed(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ToolkitError(f"the {part} of a reference is not Python: {error}") from error
    prompt_tree = trees.pop("prompt")
    names = {entry_point} if entry_point else _names_read(trees.values()) - _names_bound([prompt_tree, *trees.values()])
    counting = _Counted()
    setup, *tests = (ast.unparse(counting.visit(tree)) for tree in trees.values())
    return Tests(prompt, setup, tuple(tests), tuple(sorted(names)), counting.asserts > 0)


class _Counted(ast.NodeTransformer):
    """Makes asserts count, so that those after a failed one count too. One that says nothing about the candidate
    (`assert True`) is left unchanged."""

    asserts = 0

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        if isinstance(node.test, ast.Constant):
            return node
        self.asserts += 1
        source = repr(ast.unparse(node.test)[:200])
        (attempt,) = parsed(
            "try:\n    _passed = bool(...)\n"
            f"except Exception as _error:\n    _count(False, {source}, _error)\n"
            f"else:\n    _count(_passed, {source}, None)"
        ).body
        call = attempt.body[0].value  # pyright: ignore[reportAttributeAccessIssue]
        call.args[0] = node.test
        return attempt


def _names_read(trees: Iterable[ast.AST]) -> set[str]:
    """Names that are read, except builtins."""
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - set(dir(builtins))


def _names_bound(trees: Iterable[ast.AST]) -> set[str]:
    """Names that are assigned somewhere."""
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
