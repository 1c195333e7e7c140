"""How `make docs` makes a site of this folder: Sphinx with MyST and the theme Furo, nothing fetched."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "deepseek-v2-toolkit"
html_title = project
extensions = ["myst_parser"]
root_doc = "index"
exclude_patterns = ["README.md"]  # which index.md shows
html_theme = "furo"
html_copy_source = html_show_sourcelink = html_show_copyright = False
myst_heading_anchors = 4
pygments_style = "friendly"
pygments_dark_style = "monokai"

SECTION = re.compile(r"^## (.+)\n((?:(?!## ).*\n?)*)", re.MULTILINE)
LISTED = re.compile(r"^- \[[^]]+\]\(([^)]+)\.md\)", re.MULTILINE)


def with_navigation(readme: str) -> str:
    """The list of pages, with a table of contents for the side bar from each of its sections."""

    def contents(section: re.Match[str]) -> str:
        pages = "\n".join(LISTED.findall(section[2]))
        return f"{section[0].rstrip()}\n\n```{{toctree}}\n:hidden:\n:caption: {section[1]}\n\n{pages}\n```\n\n"

    return SECTION.sub(contents, readme)


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    if page == root_doc:
        source[0] = with_navigation((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))


def setup(app: Sphinx) -> None:
    app.connect("source-read", _read)
