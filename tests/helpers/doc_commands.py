"""The commands that pages of the documentation show: lines that begin with "$ ", in console blocks or indented ones."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^```console\n(?P<fenced>.*?)^```$|(?P<indented>(?:^ {4}[^\n]*\n)+)", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """A command of a page: its line, what it is fed by a here-document, and the lines that follow it."""

    line: str
    text: str
    expected: list[str]


def commands(page: Path) -> Iterator[Command]:
    for block in SHOWN.finditer(page.read_text(encoding="utf-8")):
        shown = block["fenced"] or re.sub(r"^ {4}", "", block["indented"], flags=re.MULTILINE)
        shown = re.sub(r" *\\\n *", " ", shown)  # a command that goes on in the next line
        for part in re.split(r"^\$ ", shown, flags=re.MULTILINE)[1:]:
            line, *rest = part.splitlines()
            fed = line.endswith("<<'END'")
            text = "".join(f"{row}\n" for row in rest[: rest.index("END")]) if fed else ""
            yield Command(line, text, [] if fed else rest)


def files(page: Path) -> Iterator[tuple[str, str]]:
    """The files that a page shows: YAML whose first line is a comment with its name."""
    for language, block in FENCED.findall(page.read_text(encoding="utf-8")):
        if language == "yaml" and (named := re.match(r"# (\w+\.yaml)\n", block)):
            yield named[1], block
