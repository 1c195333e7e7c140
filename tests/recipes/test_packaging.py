"""pyproject.toml and constraints.txt say what the code needs."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from setuptools.config import pyprojecttoml

import dsv2_start

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["importlinter"]["root_packages"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
HOMES = {"serve": Path("recipes/serving"), "gym": Path("conversations/answers/gym.py")}  # what imports an extra
GUEST = ROOT / "conversations" / "sandbox" / "guest"  # scripts that import one another, where no package is


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it; extras and versions cut off."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name)[0]).lower()


def imported_modules(path: Path) -> set[str]:
    """Top-level names of all absolute imports of a file, wherever they stand in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_a_declared_dependency(package):
    extras = (EXTRAS[name] for name, home in HOMES.items() if home.parts[0] == package)
    declared = {normal(name) for name in (*PROJECT["project"]["dependencies"], *chain.from_iterable(extras))}
    homes = packages_distributions()
    files = list((ROOT / package).rglob("*.py"))
    assert files
    own = {*PACKAGES, "dsv2_start", *(path.stem for path in GUEST.glob("*.py"))}
    imported = set().union(*map(imported_modules, files)) - set(sys.stdlib_module_names) - own
    undeclared = {name for name in imported if not declared & {normal(home) for home in homes.get(name, [name])}}
    assert not undeclared


@pytest.mark.parametrize("extra", HOMES)
def test_an_extra_is_imported_in_its_place_only(extra):
    """There the code says what to install; everything else must work without."""
    names = {normal(name) for name in EXTRAS[extra]}
    users = [
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if {normal(name) for name in imported_modules(path)} & names
    ]
    assert users and all((ROOT / HOMES[extra]) in (path, *path.parents) for path in users)


def test_constraints_pin_every_dependency_exactly():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins), (
        "one name==version a line, no +cpu"
    )
    assert "torch==2.13.0" in pins
    pinned = (names for extra, names in EXTRAS.items() if extra != "gym")  # its own pin of tabulate is an older one
    wanted = [*PROJECT["project"]["dependencies"], *chain.from_iterable(pinned)]
    assert {normal(name) for name in wanted} <= {normal(pin) for pin in pins}


def test_the_versions_that_are_promised_are_those_that_are_tested():
    """`make test` and `make test-oldest` take Python 3.11, `make test-newest` the newest one."""
    makefile = (ROOT / "Makefile").read_text()
    newest = re.search(r"^NEWEST := (.*)$", makefile, re.MULTILINE)
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    named = [line.split(" :: ")[-1] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert newest and named == [oldest, newest[1]]
    assert f"PYTHON ?= $(shell for p in python{oldest} " in makefile
    floors = dict(re.findall(r"'(torch|transformers|peft)==([0-9.]+)\.\*'", makefile))
    wanted = (re.match(r"(torch|transformers|peft)>=([0-9.]+)", line) for line in PROJECT["project"]["dependencies"])
    assert floors == dict(found.groups() for found in wanted if found)


def test_every_package_is_installed_and_checked():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert found == set(PACKAGES)
    assert set(PROJECT["tool"]["pyright"]["include"]) == {*found, "dsv2_start.py"}
    assert set(dsv2_start.PACKAGES) == found
    installed = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert installed == found


def test_the_version_stands_in_one_place_and_has_its_section_of_changes():
    text = (ROOT / "deepseek_v2_modeling" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(\d+\.\d+\.\d+)"', text, re.MULTILINE)
    assert found and "version" not in PROJECT["project"]
    assert pyprojecttoml.read_configuration(ROOT / "pyproject.toml")["project"]["version"] == found[1]
    assert f"\n## {found[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
