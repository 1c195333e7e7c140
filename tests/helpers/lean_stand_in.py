"""A program that behaves like Lean 4's `lean --stdin --json`, for tests on machines without it: it reads the source
from stdin, writes messages as lines of JSON, and ends with code 1 after an error.

It knows theorems `theorem NAME : A = B` on numbers (and True), proved by `norm_num` or `rfl` where they hold,
`trivial`, `sorry` (a warning, as Lean's), `cheat` (an axiom), `loop`, `spawn` and `stop_here`, after which nothing is
read.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

SCRIPT = """#!{python} -IS
import sys
sys.dont_write_bytecode = True
exec(compile(open({source!r}).read(), "lean", "exec"))
"""


def install(folder: Path) -> Path:
    """The program's path, in a folder of its own."""
    path = folder / "bin" / "lean"
    path.parent.mkdir(parents=True)
    source = folder / "lean.py"
    source.write_text(Path(__file__).read_text())
    path.write_text(SCRIPT.format(python=os.path.realpath(sys.executable), source=str(source)))
    path.chmod(0o755)
    return path


def message(severity, line, text):
    print(json.dumps({"severity": severity, "pos": {"line": line, "column": 0}, "fileName": "<stdin>", "data": text}))


def proves(tactic, goal):
    if goal == "True":
        return tactic in ("trivial", "norm_num")
    left, right = goal.split("=")
    return tactic in ("norm_num", "rfl") and eval(left) == eval(right)


def main():
    if sys.argv[1:] != ["--stdin", "--json"]:
        sys.exit(f"unknown arguments {sys.argv[1:]}")
    source, failed, axioms = sys.stdin.read(), False, {}
    for theorem in re.finditer(r"theorem (\w+) : ([^:]+):=\s*by\s+(.*?)(?=\n\n|\ntheorem|\Z)", source, re.DOTALL):
        name, goal, tactics = theorem[1], theorem[2].strip(), theorem[3].split("\n")
        line = source[: theorem.start(3)].count("\n") + 1
        tactic = re.sub(r"/-.*?-/|--[^\n]*", "", tactics[0]).strip()
        axioms[name] = []
        if tactic == "sorry":
            message("warning", line, "declaration uses 'sorry'")
            axioms[name] = ["sorryAx"]
        elif tactic == "cheat":
            axioms[name] = ["propext", "Lean.ofReduceBool"]
        elif tactic == "loop":
            time.sleep(60)
        elif tactic == "spawn":
            try:
                os.fork()
                message("error", line, "a process was started")
            except OSError:
                beside = os.listdir(Path(sys.argv[0]).parents[2])
                message("error", line, f"not permitted; sees {beside} {list(os.environ)}")
            failed = True
        elif tactic == "stop_here":
            sys.exit(0)
        elif not proves(tactic, goal):
            message("error", line, f"unsolved goals\n⊢ {goal}")
            failed = True
    for number, text in enumerate(source.splitlines(), 1):
        if text.startswith("#print axioms "):
            name = text.split()[-1]
            used = axioms.get(name)
            if used is None:
                message("error", number, f"unknown constant '{name}'")
                failed = True
            else:
                told = f"depends on axioms: [{', '.join(used)}]" if used else "does not depend on any axioms"
                message("information", number, f"'{name}' {told}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
