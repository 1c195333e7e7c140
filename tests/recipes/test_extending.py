"""docs/extending.md, followed to the letter: its blocks in a copy of the packages, its commands through `dsv2`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)+)", PAGE, re.MULTILINE))
PACKAGES = ("conversations", "deepseek_v2_modeling", "eval", "pairs", "recipes", "reward", "rl", "sft")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Commands one after the other in one process, which loads torch once; other commands by the shell.
DRIVER = """
import contextlib, io, json, shlex, subprocess, sys
from recipes.cli import main
found = []
for command in json.load(open(sys.argv[1])):
    if command.startswith("dsv2 "):
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            main(shlex.split(command)[1:])
        found.append(told.getvalue())
    else:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        found.append(done.stdout + done.stderr)
json.dump(found, open(sys.argv[2], "w"))
"""


class Command(NamedTuple):
    line: str
    expected: list[str]


def commands(section: str) -> list[Command]:
    found: list[Command] = []
    for language, block in BLOCK.findall(SECTIONS[section]):
        for line in block.splitlines() if language == "console" else ():
            if line.startswith("$ "):
                found.append(Command(line[2:], []))
            else:
                found[-1].expected.append(line)
    return found


def change(text: str, block: str) -> str:
    """A text after a diff block: the lines that it shows stand there once."""
    lines = block.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, f"this must stand there once:\n{before}"
    return text.replace(before, after)


def follow(home: Path) -> None:
    """All blocks of the page that are parts of files."""
    for language, block in BLOCK.findall(PAGE):
        head, _, rest = block.partition("\n")
        path = home / head[4:] if language == "diff" else home / head[2:]
        if language == "diff":
            path.write_text(change(path.read_text(encoding="utf-8"), rest), encoding="utf-8")
        elif language != "console":
            path.parent.mkdir(exist_ok=True)
            before = path.read_text(encoding="utf-8") + "\n\n" if path.exists() else ""
            path.write_text(before + rest, encoding="utf-8")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The output of each command, by section."""
    home = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, home / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dsv2_start.py", "pyproject.toml"):
        shutil.copy(ROOT / name, home)
    follow(home)
    lines = [command.line for section in SECTIONS for command in commands(section)]
    (home / "commands.json").write_text(json.dumps(lines))
    paths = {"PYTHONPATH": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", DRIVER, "commands.json", "told.json"]
    done = subprocess.run(
        command, cwd=home, env={**os.environ, **paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = iter(json.loads((home / "told.json").read_text()))
    return {section: [next(said) for _ in commands(section)] for section in SECTIONS}


@pytest.mark.parametrize("section", SECTIONS)
def test_each_extension_does_what_the_page_says(section: str, outputs: dict[str, list[str]]):
    assert commands(section)
    for command, said in zip(commands(section), outputs[section], strict=True):
        expected = "\n".join(command.expected)
        pattern = ".*".join(map(re.escape, expected.split("...")))
        assert re.fullmatch(pattern, said.strip("\n"), re.DOTALL), f"$ {command.line}\n{said}\nis not\n{expected}"
