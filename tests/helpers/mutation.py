"""Mutation testing: a sample of the mutants of an area's files, and which of them its tests do not detect.

    python -m tests.helpers.mutation answers --sample 40    (needs the extra `mutation`; CONTRIBUTING.md has the shares)

mutmut writes the mutants into a copy of the tracked files in build/mutation. For each one a fork of a process that has
imported the libraries runs those of the area's tests that call the function until one fails (all tests, if only an
import calls it, or another process). Mutants that only change the words of a message are left out.
"""

import argparse
import ast
import difflib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mutmut.mutation import trampoline
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name

ROOT = Path(__file__).parents[2]
LIBRARIES = ("trl.trainer.sft_trainer", "trl.trainer.grpo_trainer", "trl.trainer.reward_trainer", "datasets")
REACH = Path("build/reach.json")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Area:
    """What is mutated (paths that may hold *), and the files of tests that are to notice."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


AREAS = {
    "rendering": Area(
        ("conversations/rendering/*.py",),
        (
            "test_rendering",
            "test_infill",
            "test_fitting",
            "test_untrained_turns",
            "test_words",
            "test_row_cache",
            "test_own_template",
        ),
    ),
    "answers": Area(("conversations/answers/*.py",), ("test_rules", "test_math")),
    "reading": Area(
        ("conversations/formats/*.py", "conversations/reading/*.py"),
        (
            "test_formats",
            "test_row_forms",
            "test_tools",
            "test_reading",
            "test_tables",
            "test_untrained_turns",
            "test_data_paths",
        ),
    ),
    "rewards": Area(
        ("conversations/rewards/*.py",), ("test_rewards", "test_own_rewards", "test_judges", "test_open_ended")
    ),
    "generation": Area(
        ("conversations/generation/*.py",),
        ("test_generation_settings", "test_stage_eval", "test_stage_pairs", "test_stage_sft", "test_lm_eval"),
    ),
    "rl": Area(
        ("rl/*.py", "rl/rollouts/*.py"),
        (
            *("test_stage_rl", "test_rl_groups", "test_rl_phases", "test_rl_packing", "test_rl_mismatch"),
            *("test_held_out", "test_environments", "test_curriculum", "test_routing_replay", "test_objectives"),
            *("test_rollouts", "test_sharding", "test_train_router", "test_vllm"),
        ),
    ),
    "preferences": Area(("rl/preferences/*.py",), ("test_preferences", "test_preference_recipes")),
    "reward": Area(("reward/*.py",), ("test_stage_reward", "test_heads", "test_reward_recipe")),
    "eval": Area(
        ("eval/*.py",),
        (
            "test_stage_eval",
            "test_eval_command",
            "test_generation_settings",
            "test_agreement",
            "test_judges",
            "test_environments",
            "test_lean_rule",
            "test_recipes_loader",
        ),
    ),
    "pairs": Area(("pairs/*.py",), ("test_choosing", "test_stage_pairs")),
    "recipes": Area(
        (
            *(f"recipes/runs/{name}.py" for name in ("directory", "identity", "stage")),
            *("recipes/chains/*.py", "recipes/data/mixing.py", "recipes/data/splits.py"),
        ),
        (
            "test_recipes_rundir",
            "test_recipes_results",
            "test_recipes_chain",
            "test_recipes_run",
            "test_recipes_data",
            "test_recipes_twice",
            "test_run_identity",
            "test_recipes_lock",
            "test_row_cache",
            "test_eval_command",
        ),
    ),
}


def copy_tree(work: Path) -> None:
    """The tracked files."""
    shutil.rmtree(work, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, work / name)
    with (work / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write('\n[tool.mutmut]\nsource_paths = ["conversations"]\n')  # it does not start without


def find_test(name: str) -> str:
    (found,) = (ROOT / "tests").rglob(f"{name}.py")
    return str(found.relative_to(ROOT))


def write_mutants(area: Area) -> dict[str, str]:
    """Writes all mutants into the area's files, and gives the changed lines of those that change more than words."""
    changed: dict[str, str] = {}
    for path in sorted({path for pattern in area.files for path in Path().glob(pattern)}):
        mutated = mutate_file_contents(str(path), path.read_text(encoding="utf-8"))
        path.write_text(mutated.code, encoding="utf-8")
        functions = [node for node in ast.walk(ast.parse(mutated.code)) if isinstance(node, FUNCTIONS)]
        texts = {node.name: [ast.unparse(part) for part in node.body] for node in functions}
        bodies = {node.name: [ast.dump(Wordless().visit(part)) for part in node.body] for node in functions}
        for mutant in mutated.mutant_names:
            original = mutant.partition("__mutmut_")[0] + "__mutmut_orig"
            if bodies[mutant] != bodies[original]:
                lines = difflib.ndiff("\n".join(texts[original]).split("\n"), "\n".join(texts[mutant]).split("\n"))
                changed[get_mutant_name(path, mutant)] = "\n".join(x for x in lines if x[0] in "+-")
    return changed


class Wordless(ast.NodeTransformer):
    """Takes the words out of messages: texts with a space in them."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) and " " in node.value else node


class Reach:
    """A pytest plugin: notes which tests call which functions, or runs some tests alone."""

    def __init__(self, only: Collection[str] = ()) -> None:
        self.only, self.tests, self.running = only, dict[str, list[str]](), ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.only:
            items[:] = [item for item in items if item.nodeid in self.only]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid

    def note(self, function: str, caller: str | None = None) -> None:
        tests = self.tests.setdefault(function, [])
        if self.running not in tests:
            tests.append(self.running)


def start_tests(mutant: str, tests: list[str]) -> int:
    """Runs the tests until one fails, in a fork with a log of its own. Gives its process id.

    Without a mutant, build/reach.json tells afterwards which tests call which functions (those in other processes not).
    """
    child = os.fork()
    if child:
        return child
    os.setsid()  # ended together with all that it starts
    log = os.open(f"build/{mutant or 'unchanged'}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        if mutant:
            os.environ["MUTANT_UNDER_TEST"] = mutant
            calling = json.loads(REACH.read_text()).get(mutant.partition("__mutmut_")[0], [""])
            reach = Reach(() if "" in calling else calling)  # "": an import
        else:
            reach = Reach()
            vars(trampoline)["record_trampoline_hit"] = reach.note
            trampoline.set_mutant_under_test("stats")
            del os.environ["MUTANT_UNDER_TEST"]  # other processes would write mutmut's own notes
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[reach])
        if not mutant:
            REACH.write_text(json.dumps(reach.tests))
    finally:
        os._exit(int(code))


def run_tests(mutants: list[str], tests: list[str], processes: int, limit: float) -> Iterator[tuple[str, str]]:
    """(mutant, "killed", "time limit" or "SURVIVED"), in the order in which they end."""
    waiting, running = list(mutants), dict[int, tuple[str, float]]()
    while waiting or running:
        while waiting and len(running) < processes:
            mutant = waiting.pop(0)
            running[start_tests(mutant, tests)] = (mutant, time.monotonic() + limit)
        time.sleep(0.1)
        for child, (mutant, end) in list(running.items()):
            late = time.monotonic() > end
            if late:
                os.killpg(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if ended:
                del running[child]
                yield mutant, "time limit" if late else "killed" if status else "SURVIVED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("area", choices=AREAS)
    parser.add_argument("--sample", type=int, default=40, help="how many of the mutants (40); 0 takes all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    area = AREAS[args.area]
    tests = [find_test(name) for name in area.tests]
    work = ROOT / "build" / "mutation" / args.area
    copy_tree(work)
    os.chdir(work)
    Path("build").mkdir()
    changed = write_mutants(area)
    chosen = random.Random(args.seed).sample(list(changed), min(args.sample or len(changed), len(changed)))
    print(f"{args.area}: {len(chosen)} of {len(changed)} mutants", flush=True)
    # What tests import and start is the copy. The libraries are imported once, for all forks.
    sys.path[:] = [str(work), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, work))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os.environ |= {"PYTHONPATH": str(work), "MUTANT_UNDER_TEST": "", "OMP_NUM_THREADS": "1"}
    for name in LIBRARIES:
        importlib.import_module(name)

    start = time.monotonic()
    ((_, verdict),) = run_tests([""], tests, 1, 1800)
    if verdict != "SURVIVED":
        sys.exit(f"the tests fail without a mutant: {work}/build/unchanged.log")
    limit = 3 * (time.monotonic() - start) + 60
    counts: dict[str, int] = dict.fromkeys(("killed", "time limit", "SURVIVED"), 0)
    for mutant, verdict in run_tests(chosen, tests, args.processes, limit):
        counts[verdict] += 1
        print(f"{verdict}: {mutant}", flush=True)
        if verdict == "SURVIVED":
            print(changed[mutant], flush=True)
    print(f"{args.area}: {counts}")


if __name__ == "__main__":
    main()
