"""Start-up time of Python with and without a sandbox, and checks of the rule `code` per second.

    python -m benchmarks.sandbox [ROWS.jsonl] [--wasm python.wasm]

ROWS.jsonl: rows of HumanEval with canonical_solution; by default, one built-in row of that size is repeated. --wasm: a
build of CPython for WASI, run by wasmtime (`pip install wasmtime`), which first compiles it.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import seconds, write
from conversations.answers.many import Asked, verify_all
from conversations.answers.verdict import Verdict
from conversations.sandbox.box import isolation

OPTIONS = ["-I", "-S", "-B", "-c"]
PYTHON = [os.path.realpath(sys.executable), *OPTIONS]
WORK = {"start": "pass", "loop": "sum(i * i for i in range(10**6))"}
NAMESPACES = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork"]
CHECKS = 100
ROW = {
    "prompt": "def below(numbers: list, limit: int) -> bool:\n    '''Whether all numbers are below the limit.'''\n",
    "entry_point": "below",
    "test": "def check(candidate):\n" + "".join(f"    assert candidate([1, {n}], 5) == {n < 5}\n" for n in range(8)),
    "canonical_solution": "    return all(number < limit for number in numbers)\n",
}


def in_wasm(path: Path) -> Callable[[str], None]:
    """Runs code in a CPython for WASI, in this process: a module that is compiled once, a new instance for each."""
    wasmtime: Any = importlib.import_module("wasmtime")  # not a dependency
    engine: Any = wasmtime.Engine()
    began = time.perf_counter()
    module = wasmtime.Module.from_file(engine, str(path))
    print(f"{time.perf_counter() - began:.1f} s to compile {path.name}")
    linker = wasmtime.Linker(engine)
    linker.define_wasi()

    def run(code: str) -> None:
        store: Any = wasmtime.Store(engine)
        settings = wasmtime.WasiConfig()
        settings.argv = ["python", *OPTIONS, code]
        store.set_wasi(settings)
        start: Any = linker.instantiate(store, module).exports(store)["_start"]
        try:
            start(store)
        except wasmtime.ExitTrap as end:
            if end.code:
                raise

    return run


def in_process(before: list[str], code: str) -> None:
    subprocess.run([*before, *PYTHON, code], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=Path)
    parser.add_argument("--wasm", type=Path)
    args = parser.parse_args()
    given = args.rows
    rows: list[dict[str, Any]] = [ROW] * CHECKS
    if given:
        rows = [json.loads(line) for line in given.read_text().splitlines()]
    before = {"python": [], "unshare": NAMESPACES, "bubblewrap": isolation(1)}
    ways: dict[str, Callable[[str], None]] = {name: partial(in_process, words) for name, words in before.items()}
    if args.wasm:
        ways["wasmtime"] = in_wasm(args.wasm)
    took = {
        name: {what: seconds(partial(run, code), 20 if what == "start" else 5) for what, code in WORK.items()}
        for name, run in ways.items()
    }
    began = time.perf_counter()
    verdicts = verify_all("code", [Asked(row["canonical_solution"], reference=row) for row in rows])
    rate = len(rows) / (time.perf_counter() - began)
    passed = sum(isinstance(verdict, Verdict) and verdict.score == 1 for verdict in verdicts)
    for name, times in took.items():
        print(f"{name:<11} {1000 * times['start']:5.1f} ms to start, {1000 * times['loop']:6.1f} ms with a loop")
    print(f"{rate:.1f} checks per second; {passed} of {len(rows)} pass")
    in_ms = {name: {what: round(1000 * time, 1) for what, time in times.items()} for name, times in took.items()}
    write("sandbox", {"ms": in_ms, "checks_per_s": round(rate, 1), "passed": passed, "of": len(rows)})


if __name__ == "__main__":
    main()
