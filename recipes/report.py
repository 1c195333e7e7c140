"""`dsv2 report`: one self-contained HTML page about one or more runs. No scripts, no network, no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count as count_up
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from conversations.errors import ToolkitError
from recipes import report_tables as tables
from recipes.files import write_text
from recipes.report_data import Run, open_runs
from recipes.report_metrics import count
from recipes.report_plots import charts, expert_maps
from recipes.report_samples import Gallery, across_runs, within_run
from recipes.report_svg import COLOURS, LOAD_CLASSES, Chart, caption, line_chart, short

KINDS = {
    "sft": "supervised fine-tuning",
    "reward": "reward model",
    "rl": "reinforcement learning",
    "eval": "evaluation",
    "chain": "chain",
}
LONG_TEXT = 300
# Characters that HTML or UTF-8 forbids, and those that reorder the text around them.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Figure:
    """A drawn chart with its legend: (number of the colour, dashed, label, last value)."""

    title: str
    drawing: Markup
    legend: Sequence[tuple[int, bool, str, str]]
    note: str


@dataclass(frozen=True)
class ChainView:
    """A chain's headline: tables, facts, and whatever else its results hold."""

    run: Run
    facts: list[tuple[str, str]]
    tables: list[tables.Table]
    rest: list[tuple[str, str]]


@dataclass(frozen=True)
class RunView:
    """One run as the page shows it. Of its manifest: the `brief`, and all of it as short `facts` and long `texts`."""

    run: Run
    title: str
    kind: str
    figures: list[Figure]
    maps: list[tuple[str, Markup]]
    other: list[Figure]
    loose: list[tuple[str, str]]
    rejected: list[tuple[str, str]]
    brief: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    texts: list[tuple[str, str]]
    samples: Gallery | None


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about `runs` (a stage's or a chain's directories) and return where it is.

    `out` defaults to report.html in the first run. The page appears whole or not at all. The same runs give
    the same bytes. Whatever is missing or unreadable in a run is said on the page.

    Raises:
        ToolkitError: no run given, a directory that is no run, or `out` cannot be written.
    """
    if not runs:
        raise ToolkitError("no run given; name the output_dir of a stage or of a chain")
    target = out if out is not None else runs[0] / "report.html"
    page = render(_unique_names([open_runs(path) for path in dict.fromkeys(runs)]))
    if target.is_dir():
        raise ToolkitError(f"{target} is a directory; name the HTML file to write")
    try:
        write_text(target, UNPRINTABLE.sub("\ufffd", page))
    except OSError as error:
        raise ToolkitError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def render(groups: Sequence[Sequence[Run]]) -> str:
    """The page's HTML. Each group is what one directory of the command line holds."""
    runs = [run for group in groups for run in group]
    chains = [run for run in runs if run.is_chain]
    titles = {name: title for group in groups for name, title in _titles(group).items()}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        heading=" and ".join(group[0].name for group in groups),
        chains=[_chain_view(run) for run in chains],
        across=tables.across(chains),
        runs=[_run_view(run, titles[run.name]) for run in runs],
        notes=[(run.name, titles[run.name], note) for run in runs for note in run.notes],
        gallery=across_runs(runs, titles),
        load_classes=LOAD_CLASSES,
        anchor=partial(_anchor, [run.name for run in runs]),
        count=count,
    )


def _unique_names(groups: Sequence[list[Run]]) -> Sequence[list[Run]]:
    """With several directories a stage is named with its own; equal names get numbers."""
    taken: set[str] = set()
    for group in groups:
        head = group[0].name
        for run in group:
            base = run.name if len(groups) == 1 or run is group[0] else f"{head}/{run.name}"
            numbered = (base if k == 1 else f"{base} ({k})" for k in count_up(1))
            run.name = next(name for name in numbered if name not in taken)
            taken.add(run.name)
    return groups


def _titles(group: Sequence[Run]) -> dict[str, str]:
    """Page names of a chain's runs: an evaluation whose figures go to `stages.sft` is titled after that stage."""
    stages = group[0].recipe.get("stages")
    listed = stages if isinstance(stages, list) else []
    told = {str(s.get("name")): str(s["results"]) for s in listed if isinstance(s, dict) and s.get("results")}
    titles = {}
    for run in group:
        own = run.path.name if run is not group[0] else run.name
        section, _, entry = told.get(own, "").partition(".")
        known = tables.stage_name(entry) if section == "stages" else ""
        titles[run.name] = known or run.name
    return titles


def _anchor(names: Sequence[str], name: str) -> str:
    """An id that no name can break out of."""
    return f"run-{names.index(name)}"


def _chain_view(run: Run) -> ChainView:
    results = run.results
    stages, models = (tables.entries(results, section) for section in ("stages", "reward_models"))
    found = [
        tables.shares_table("Stages", stages, tables.STAGE_NAMES),
        tables.gains(results),
        tables.shares_table("Reward models", models, {}),
        tables.targets(results),
    ]
    return ChainView(run, tables.facts(results), [t for t in found if t], tables.other_results(results))


def _run_view(run: Run, title: str) -> RunView:
    main, other = charts(run.metrics)
    flat = tables.flatten(run.manifest)
    return RunView(
        run=run,
        title=title,
        kind=KINDS.get(run.kind, run.kind),
        figures=[_figure(chart) for chart in main],
        maps=expert_maps(run.metrics),
        other=[_figure(chart) for chart in other],
        loose=tables.flatten(run.metrics.loose),
        rejected=[(reason, count(n, "row")) for reason, n in run.rejected.most_common()],
        brief=tables.brief(run.manifest),
        facts=[pair for pair in flat if len(pair[1]) <= LONG_TEXT and "\n" not in pair[1]],
        texts=[pair for pair in flat if len(pair[1]) > LONG_TEXT or "\n" in pair[1]],
        samples=within_run(run),
    )


def _figure(chart: Chart) -> Figure:
    legend = [
        (index % COLOURS, index >= COLOURS, line.label, short(line.points[-1][1]))
        for index, line in enumerate(chart.lines)
    ]
    return Figure(chart.title, line_chart(chart), legend, caption(chart))
