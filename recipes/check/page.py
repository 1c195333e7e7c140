"""The `dsv2 check` page: one self-contained HTML file without scripts or requests; all data is escaped."""

from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from conversations.errors import ToolkitError
from conversations.sections import FormatSection
from conversations.stage import Stage
from recipes.check.histogram import bins
from recipes.data.sources import Mixture
from recipes.files import write_text
from recipes.html import render_page
from recipes.plan.measure import Figures, Plan
from recipes.report.svg import histogram
from recipes.results.layout import Cell, Table

HEADINGS = ("Source", "Rows", "Left out", "Used", "Share", "Tokens", "Trained")


@dataclass(frozen=True)
class DataView:
    """A list of data entries: its `key` in the recipe, its rows, and their token counts if there was a tokenizer."""

    key: str
    mixture: Mixture
    figures: Figures | None

    @property
    def table(self) -> Table:
        """A table with a row for each source."""
        rows = []
        for index, file in enumerate(self.mixture.files):
            tokens, trained = self.figures.tokens_of(index) if self.figures else (0, 0)
            share = f"{100 * file['used'] / len(self.mixture.rows):.1f} %"
            cells = [f"{file['rows']:,}", f"{file['left_out']:,}", f"{file['used']:,}", share]
            cells += [f"{count:,}" if count else "–" for count in (tokens, trained)]
            rows.append([Cell(Path(file["path"]).name, tuple(file["formats"])), *map(Cell, cells)])
        return Table(f"Sources of {self.key}", [*map(Cell, HEADINGS)], rows)

    def histogram(self, max_length: int | None) -> tuple[Markup, str]:
        """The lengths as a drawing that marks max_length, and a caption."""
        assert self.figures is not None
        spread = bins(self.figures.report.lengths, self.figures.scale)
        drawing = histogram(spread, max_length, f"Lengths of the rows of {self.key}, in tokens")
        if max_length is None:
            return drawing, ""
        place = "The line is" if max_length <= spread[-1].high + 1 else "Every row is shorter than"
        return drawing, f"{place} max_length, {max_length:,}."


@dataclass
class StageView:
    """A stage on the page. format: the recipe's section; missing: why there are no token counts."""

    name: str
    recipe: str
    max_length: int | None
    format: FormatSection | None
    stage: Stage
    missing: str = ""
    data: list[DataView] = field(default_factory=list)
    plan: Plan | None = None


def page_path(output_dir: Path) -> Path:
    """OUTPUT_DIR.check.html, beside the run directory."""
    place = output_dir if output_dir.name.strip(".") else output_dir.absolute()
    return place.parent / f"{place.name}.check.html"


def write_page(output_dir: Path, recipe: str, stages: list[StageView]) -> Path:
    """Write the page beside the run directory and return its path.

    Raises:
        ToolkitError: it cannot be written.
    """
    target = page_path(output_dir)
    try:
        write_text(target, render_page("check.html.jinja", recipe=recipe, stages=stages))
    except OSError as error:
        raise ToolkitError(f"{target}: {error.strerror or error}") from error
    return target
