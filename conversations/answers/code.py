"""The rule `code`: whether an answer's code passes the tests of its row, in a sandbox."""

import ast
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from conversations.answers.verdict import Verdict
from conversations.errors import ToolkitError
from conversations.sandbox import box
from conversations.sandbox.checking import Outcome, check_functions, check_program
from conversations.sandbox.tests import Tests, parsed, prepared

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = ("", "python", "py", "python3")
_CODE_BEGINS = re.compile(r"^(?:def|class|import|from|@|async def)\b", re.MULTILINE)
_MAX_TRAILING_LINES = 40  # how many lines after unfenced code may be prose
FORMS = (
    "{prompt, entry_point, test} (HumanEval), the same with {prefix, suffix} around a hole, {test_list} with "
    "test_setup_code or not (MBPP), or {tests: [{stdin, stdout}, ...]}"
)


class Problem(NamedTuple):
    """How an answer is checked: `tests` of functions, or `cases` of a program. prompt: code that the answer continues.
    entry_point: the function that the answer must define, if the row names it. around: the code before and after the
    hole that the answer fills, as it is."""

    prompt: str = ""
    entry_point: str | None = None
    tests: Tests | None = None
    cases: tuple[Mapping[str, str], ...] = ()
    around: tuple[str, str] | None = None

    @property
    def names(self) -> frozenset[str]:
        """The names that the answer should define."""
        return frozenset(self.tests.names if self.tests else ())


def code(
    completion: str,
    reference: Any,
    *,
    partial: bool = False,
    timeout: float = 10.0,
    memory: int = 512,
    allow_unsandboxed: bool = False,
) -> Verdict:
    """Whether the answer's code passes the tests of the reference.

    Args:
        reference: an unmodified row of HumanEval or MBPP, or one with the inputs and outputs of a program (FORMS).
        partial: the score is the share of tests passed, not 0 or 1.
        timeout: seconds for all tests together.
        memory: MiB of address space.
        allow_unsandboxed: runs the code without isolation, with your user's permissions.

    Raises:
        ToolkitError: this machine has no sandbox, or the reference has none of these forms.
    """
    need_sandbox({"allow_unsandboxed": allow_unsandboxed})
    problem = code_reference(reference)
    source = written_code(completion, problem)
    if source is None:
        return Verdict(0.0, "no Python code in the answer")
    limits, isolated = box.Limits(seconds=timeout, memory=memory), not allow_unsandboxed
    if problem.tests is not None:
        outcome = check_functions(source, problem.tests, limits, isolated=isolated)
    else:
        outcome = check_program(source, problem.cases, limits, isolated=isolated)
    return _verdict(outcome, partial)


def need_sandbox(settings: Mapping[str, Any]) -> None:
    """Raises ToolkitError if this machine has no sandbox, unless the settings allow running without one."""
    box.require(bool(settings.get("allow_unsandboxed")))


def _verdict(outcome: Outcome, partial: bool) -> Verdict:
    total = outcome.passed + outcome.failed
    if not outcome.failed:
        return Verdict(1.0, f"passes {total} of {total} tests" if total else "passes its tests")
    score = outcome.passed / total if partial else 0.0
    return Verdict(score, f"passes {outcome.passed} of {total} tests; {outcome.why}")


def code_reference(reference: Any) -> Problem:
    """The tests of a row. Raises ToolkitError if it has none that can be read."""
    if isinstance(reference, str):
        text = reference
    else:
        try:
            text = json.dumps(reference, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ToolkitError(f"a reference for the rule code must be one of {FORMS}: {error}") from error
    return _problem(text)


@lru_cache(maxsize=4096)
def _problem(text: str) -> Problem:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ToolkitError(f"a reference for the rule code must be one of {FORMS}, not {text[:60]!r}") from error
    row = {"tests": row} if isinstance(row, list) else row
    for key, read in _READERS.items():
        if isinstance(row, dict) and row.get(key):
            return read(row)
    raise ToolkitError(f"a reference for the rule code must be one of {FORMS}, not {text[:60]!r}")


def _humaneval(row: dict[str, Any]) -> Problem:
    prompt, entry_point, test = (_text(row, key) for key in ("prompt", "entry_point", "test"))
    if not entry_point.isidentifier():
        raise ToolkitError(f"the entry_point of a reference must be a name, not {entry_point!r:.60}")
    tests = prepared([test, f"check({entry_point})"], prompt=prompt, entry_point=entry_point)
    return Problem(prompt, entry_point, tests)


def _infilling(row: dict[str, Any]) -> Problem:
    return _humaneval(row)._replace(around=(_text(row, "prefix"), _text(row, "suffix")))


def _mbpp(row: dict[str, Any]) -> Problem:
    tests_of_row = row["test_list"]
    if not isinstance(tests_of_row, list) or not all(isinstance(test, str) for test in tests_of_row):
        raise ToolkitError("test_list of a reference must be a list of strings")
    setup = "\n".join(filter(None, [*(row.get("test_imports") or ()), row.get("test_setup_code")]))
    tests = prepared(tests_of_row, setup=setup)
    if not tests.names:
        raise ToolkitError("the test_list of a reference calls no function that an answer could define")
    return Problem(tests=tests)


def _cases(row: dict[str, Any]) -> Problem:
    cases = row["tests"]
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise ToolkitError("tests of a reference must be a list of {stdin, stdout}")
    return Problem(cases=tuple({key: _text(case, key) for key in ("stdin", "stdout")} for case in cases))


_READERS: dict[str, Callable[[dict[str, Any]], Problem]] = {
    "suffix": _infilling,
    "entry_point": _humaneval,
    "test_list": _mbpp,
    "tests": _cases,
}


def _text(row: Mapping[str, Any], key: str) -> str:
    text = row.get(key)
    if not isinstance(text, str):
        raise ToolkitError(f"{key} of a reference must be a string, not {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ToolkitError(f"{key} of a reference holds {text[error.start]!a}, which is no character") from None
    return text


# --- the code of an answer --------------------------------------------------------------------------------------------


def written_code(completion: str, problem: Problem) -> str | None:
    """The code to run: the answer's fenced or bare code, appended to the prompt if it does not repeat its signature.
    None if there is no Python."""
    if problem.around is not None:
        source = completion.join(problem.around)
        return None if _tree(source) is None else source
    fenced = [text for language, text in _FENCE.findall(completion) if language.lower() in _PYTHON]
    blocks = [textwrap.dedent(text) for text in fenced] or list(_bare(completion))
    defining = [block for block in blocks if problem.names and problem.names & _defined(block)]
    if defining:
        return _before(problem) + defining[-1]
    if problem.prompt:
        bodies = fenced or [completion]
        sources = (source for body in bodies for source in _continued(problem, body))
        return next((source for source in sources if _tree(source) is not None), None)
    python = [block for block in blocks if block.strip() and _tree(block) is not None]
    return max(python, key=len, default=None)


def _tree(source: str) -> ast.Module | None:
    try:
        return parsed(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined(source: str) -> set[str]:
    """Names that the code defines at its top level."""
    names: set[str] = set()
    for node in getattr(_tree(source), "body", ()):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else ()
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _before(problem: Problem) -> str:
    """The prompt's imports and helper functions: everything before the function that the answer should define."""
    for node in getattr(_tree(problem.prompt), "body", ()):
        if getattr(node, "name", None) == problem.entry_point and isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "".join(problem.prompt.splitlines(keepends=True)[: first - 1])
    return ""


def _bare(completion: str) -> Iterator[str]:
    """Code without a fence: the whole text, or from the first line that looks like code to the last that parses."""
    yield completion
    begins = _CODE_BEGINS.search(completion)
    if begins is None:
        return
    lines: Sequence[str] = completion[begins.start() :].splitlines(keepends=True)
    for end in range(len(lines), max(0, len(lines) - _MAX_TRAILING_LINES), -1):
        if _tree(part := "".join(lines[:end])) is not None:
            yield part
            return


def _continued(problem: Problem, body: str) -> Iterator[str]:
    """The prompt with a function's body: as it is indented, or with missing indentation (of its first line) added."""
    body = body.lstrip("\n")
    before = problem.prompt + ("" if problem.prompt.endswith("\n") else "\n")
    as_it_is = before + ("" if body[:1].isspace() else "    ") + body
    indented = before + textwrap.indent(textwrap.dedent(body), "    ")
    yield from (indented, as_it_is) if _spills(as_it_is, problem.entry_point or "") else (as_it_is, indented)


def _spills(source: str, entry_point: str) -> bool:
    """Whether statements other than definitions follow the function: a part of its body, then."""
    names = [getattr(node, "name", None) for node in getattr(_tree(source), "body", ())]
    return None in names[names.index(entry_point) :] if entry_point in names else False
