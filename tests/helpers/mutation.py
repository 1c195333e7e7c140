"""Mutation testing: a sample of the mutants of an area's files, and which of them its tests do not detect.

    python -m tests.helpers.mutation answers --sample 40    (needs the extra `mutation`; CONTRIBUTING.md has the shares)

mutmut creates the mutants in a copy of the tracked files in build/mutation, and runs the tests that reach each.
Mutants that only change the words of a message are left out.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("conversations", "rl", "reward", "eval", "pairs", "recipes")
BESIDE = (
    "deepseek_v2_modeling",
    "sft",
    "dsv2_start.py",
    "README.md",
    "CHANGELOG.md",
    "constraints.txt",
    "docs",
    "examples",
)


@dataclass(frozen=True)
class Area:
    """What is mutated (paths that may hold *), and the files of tests that are to notice."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


AREAS = {
    "rendering": Area(
        ("conversations/rendering/*.py",),
        ("test_rendering", "test_infill", "test_fitting", "test_untrained_turns", "test_words", "test_row_cache"),
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
    "rewards": Area(("conversations/rewards/*.py",), ("test_rewards", "test_own_rewards", "test_judges")),
    "generation": Area(
        ("conversations/generation/*.py",),
        ("test_generation_settings", "test_stage_eval", "test_stage_pairs", "test_stage_sft"),
    ),
    "rl": Area(("rl/**/*.py",), ("test_stage_rl", "test_rewards")),
    "reward": Area(("reward/*.py",), ("test_stage_reward", "test_heads", "test_reward_recipe")),
    "eval": Area(
        ("eval/*.py",), ("test_stage_eval", "test_eval_command", "test_generation_settings", "test_agreement")
    ),
    "pairs": Area(("pairs/*.py",), ("test_choosing", "test_stage_pairs")),
    "recipes": Area(
        (
            *(f"recipes/runs/{name}.py" for name in ("directory", "identity", "stage")),
            *("recipes/chains/*.py", "recipes/data/mixing.py", "recipes/data/splits.py"),
        ),
        ("test_recipes_rundir", "test_recipes_results", "test_recipes_chain", "test_recipes_run", "test_recipes_data"),
    ),
}


def copy_tree(area: Area, work: Path) -> None:
    """The tracked files, with mutmut's settings for the area."""
    shutil.rmtree(work, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, work / name)
    settings = {
        "source_paths": PACKAGES,
        "only_mutate": area.files,
        "also_copy": BESIDE,
        "pytest_add_cli_args": ("-q", "-p", "no:cacheprovider"),
        "pytest_add_cli_args_test_selection": [f"tests/{find_test(name)}" for name in area.tests],
        "use_git_change_detection": False,
        "process_isolation": "forkserver",  # a fork of the process that ran the tests would have its caches full
        "timeout_constant": 60,  # seconds: the times that mutmut takes leave fixtures out, and some of them train
        "timeout_multiplier": 3,
    }
    with (work / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))


def find_test(name: str) -> str:
    (found,) = (ROOT / "tests").rglob(f"{name}.py")
    return str(found.relative_to(ROOT / "tests"))


def mutants(area: Area) -> Iterator[str]:
    """The names of all mutants that change more than the words of a message."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    for path in sorted({path for pattern in area.files for path in Path().glob(pattern)}):
        mutated = mutate_file_contents(str(path), path.read_text(encoding="utf-8"))
        nodes = (node for node in ast.walk(ast.parse(mutated.code)) if isinstance(node, ast.FunctionDef))
        bodies = {node.name: [ast.dump(Wordless().visit(part)) for part in node.body] for node in nodes}
        for mutant in mutated.mutant_names:
            if bodies[mutant] != bodies[mutant.partition("__mutmut_")[0] + "__mutmut_orig"]:
                yield get_mutant_name(path, mutant)


class Wordless(ast.NodeTransformer):
    """Takes the words out of messages: texts with a space in them."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) and " " in node.value else node


def is_noticed(mutant: str, area: Area) -> bool:
    """Whether any test of the area fails. mutmut runs only the first of the tests that share a fixture."""
    files = [f"tests/{find_test(name)}" for name in area.tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "MUTANT_UNDER_TEST": mutant}
    return subprocess.run(command, cwd="mutants", env=environment, capture_output=True).returncode != 0


def mutmut(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mutmut", *words], capture_output=True, text=True)
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("area", choices=AREAS)
    parser.add_argument("--sample", type=int, default=40, help="how many of the mutants (40); 0 takes all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    area = AREAS[args.area]
    work = ROOT / "build" / "mutation" / args.area
    copy_tree(area, work)
    os.chdir(work)  # where mutmut looks for its settings
    names = list(mutants(area))
    chosen = random.Random(args.seed).sample(names, min(args.sample or len(names), len(names)))
    print(f"{args.area}: {len(chosen)} of {len(names)} mutants", flush=True)
    said = mutmut("run", "--max-children", str(args.processes), *chosen)
    verdicts = [line.split() for line in said.partition("Mutant results")[2].splitlines() if "__mutmut_" in line]
    if len(verdicts) != len(chosen):
        sys.exit(f"mutmut did not finish:\n{said[-4000:]}")
    slow = sum(mark == "⏰" for mark, _ in verdicts)
    left = [name for mark, name in verdicts if mark not in ("🎉", "⏰")]
    unreached = {name for mark, name in verdicts if mark == "🫥"}
    left = [name for name in left if name in unreached or not is_noticed(name, area)]
    for name in left:
        print(mutmut("show", name))
    print(f"{args.area}: {len(chosen) - len(left)} of {len(chosen)} killed, {slow} of them by the time limit")


if __name__ == "__main__":
    main()
