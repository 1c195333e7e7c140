"""Start-up time of Python with and without a sandbox, and checks of the rule `code` per second.

    python -m benchmarks.sandbox [ROWS.jsonl]

ROWS.jsonl: rows of HumanEval with canonical_solution; by default, one built-in row of that size is repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import seconds, write
from conversations.answers.many import Asked, verify_all
from conversations.answers.verdict import Verdict
from conversations.sandbox.box import isolation

PYTHON = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", "pass"]
NAMESPACES = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork"]
CHECKS = 100
ROW = {
    "prompt": "def below(numbers: list, limit: int) -> bool:\n    '''Whether all numbers are below the limit.'''\n",
    "entry_point": "below",
    "test": "def check(candidate):\n" + "".join(f"    assert candidate([1, {n}], 5) == {n < 5}\n" for n in range(8)),
    "canonical_solution": "    return all(number < limit for number in numbers)\n",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=Path)
    rows_file = parser.parse_args().rows
    rows: list[dict[str, Any]] = [ROW] * CHECKS
    if rows_file:
        rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    commands = {"python": PYTHON, "unshare": [*NAMESPACES, *PYTHON], "bubblewrap": [*isolation(1), *PYTHON]}
    starts = {name: seconds(partial(subprocess.run, command, check=True), 20) for name, command in commands.items()}
    began = time.perf_counter()
    verdicts = verify_all("code", [Asked(row["canonical_solution"], reference=row) for row in rows])
    rate = len(rows) / (time.perf_counter() - began)
    passed = sum(isinstance(verdict, Verdict) and verdict.score == 1 for verdict in verdicts)
    for name, start in starts.items():
        print(f"{name:<11} {1000 * start:5.1f} ms to start")
    print(f"{rate:.1f} checks per second; {passed} of {len(rows)} pass")
    starts_ms = {name: round(1000 * start, 1) for name, start in starts.items()}
    write("sandbox", {"start_ms": starts_ms, "checks_per_s": round(rate, 1), "passed": passed, "of": len(rows)})


if __name__ == "__main__":
    main()
