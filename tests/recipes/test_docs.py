"""The documentation is up to date: the API page, and the files that pages name."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# docs/log.md tells of files as they were.
PAGES = [
    path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if path.name not in ("log.md", "CHANGELOG.md")
]
FOLDERS = r"(?:conversations|deepseek_v2_modeling|sft|rl|reward|eval|recipes|tests|benchmarks|docs)"
NAMED = re.compile(rf"(?<![\w/.-]){FOLDERS}/[\w/.-]*\.(?:py|md|yaml|json|png|jinja|css)\b")


def test_generated_pages_are_those_of_todays_code(tmp_path: Path):
    for script, target in (("make_api.py", tmp_path / "api.md"), ("make_reference.py", tmp_path)):
        subprocess.run([sys.executable, ROOT / "docs" / script, target], check=True)
    for page in ("api.md", "keys.md", "commands.md", "chain.svg"):
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text(), "run: make api"


def test_the_architecture_page_has_the_contracts_of_imports():
    page = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [" > ".join(contract["layers"]) for contract in contracts if contract["type"] == "layers"]
    assert layers and [text for text in layers if text not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path):
    text = page.read_text(encoding="utf-8")
    if page.name == "extending.md":  # its blocks write files; test_extending.py follows them
        text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    missing = {name for name in NAMED.findall(text) if not (ROOT / name).exists()}
    links = (link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link)
    missing |= {link for link in links if link and not (page.parent / link).exists()}
    assert not missing


def test_messages_that_the_page_explains_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Without a message")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
    code = "\n".join(path.read_text(encoding="utf-8") for name in packages for path in (ROOT / name).rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code).replace("{{", "{").replace("}}", "}")  # adjacent literals are one
    lost = [part for message in messages for part in message.split("...") if part.strip("; ") and part not in code]
    assert len(messages) > 20 and lost == []


def test_every_page_is_listed():
    """What docs/README.md lists is the site's navigation."""
    listed = set(re.findall(r"^- \[[^]]+\]\(([^)]+)\)", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages - {"README.md", "index.md"}
