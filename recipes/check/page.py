"""The page of `dsv2 check`: one self-contained HTML file. No scripts, no network; everything from data is escaped."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from conversations.errors import ToolkitError
from recipes.check.histogram import bins, drawing
from recipes.check.measure import Figures, Plan
from recipes.data.sources import Mixture
from recipes.files import write_text
from recipes.html import render_page
from recipes.report.report import UNPRINTABLE

NUMBERS = ("Rows", "Left out", "Used", "Share", "Tokens", "Trained")


@dataclass(frozen=True)
class DataView:
    """A list of data entries: `key` in the recipe, its rows, and their tokens where a tokenizer was at hand."""

    key: str
    mixture: Mixture
    figures: Figures | None

    def table(self) -> list[tuple[str, str, list[str]]]:
        """(source, its formats, NUMBERS) for each source."""
        total = len(self.mixture.rows)
        found = []
        for index, file in enumerate(self.mixture.files):
            tokens, trained = self.figures.tokens_of(index) if self.figures else (0, 0)
            counts = [f"{count:,}" if count else "-" for count in (tokens, trained)]
            numbers = [f"{file['rows']:,}", f"{file['left_out']:,}", f"{file['used']:,}"]
            name = Path(file["path"]).name
            found.append((name, ", ".join(file["formats"]), [*numbers, f"{100 * file['used'] / total:.1f} %", *counts]))
        return found

    def histogram(self, max_length: int | None) -> Markup:
        """The lengths as a drawing."""
        assert self.figures is not None
        spread = bins(self.figures.report.lengths, self.figures.scale)
        return drawing(spread, max_length, f"Lengths of the rows of {self.key}, in tokens")


@dataclass
class StageView:
    """A stage on the page. format: the recipe's section; missing: why there are no token figures."""

    name: str
    kind: str
    recipe: str
    max_length: int | None
    format: Any
    missing: str = ""
    data: list[DataView] = field(default_factory=list)
    plan: Plan | None = None


def page_path(output_dir: Path) -> Path:
    """OUTPUT_DIR.check.html, beside the run directory."""
    place = output_dir if output_dir.name.strip(".") else output_dir.absolute()
    return place.parent / f"{place.name}.check.html"


def write_page(output_dir: Path, recipe: str, stages: list[StageView]) -> Path:
    """Write the page beside the run directory and return where it is.

    Raises:
        ToolkitError: it cannot be written there.
    """
    page = render_page("check.html.jinja", recipe=recipe, stages=stages, numbers=NUMBERS)
    target = page_path(output_dir)
    try:
        write_text(target, UNPRINTABLE.sub("\ufffd", page))
    except OSError as error:
        raise ToolkitError(f"{target}: {error.strerror or error}") from error
    return target
