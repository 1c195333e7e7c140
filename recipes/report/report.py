"""`dsv2 report`: one self-contained HTML page about one or more runs. No scripts, no network, no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count as count_up
from pathlib import Path

from markupsafe import Markup

from conversations.errors import ToolkitError
from recipes.files import write_text
from recipes.html import render_page
from recipes.lock import hold_path
from recipes.report import tables, words
from recipes.report.charts import COLOURS, LOAD_CLASSES, Chart, caption, drawn, line_chart, short
from recipes.report.metrics import count
from recipes.report.plots import charts, expert_maps
from recipes.report.run_files import Run, directory_name, open_runs
from recipes.report.samples import Gallery, across_runs, within_run

KINDS = {
    "sft": "supervised fine-tuning",
    "reward": "reward model",
    "rl": "reinforcement learning",
    "eval": "evaluation",
    "chain": "chain",
}
LONG_TEXT = 300
REASONS = 12
# Characters that HTML or UTF-8 forbids, and those that reorder the text around them.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Figure:
    """A drawn chart with its legend: (number of the colour, dashed, label, where the curve ends)."""

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
    heading: str
    kind: str
    figures: list[Figure]
    maps: list[tuple[str, Markup]]
    other: list[Figure]
    loose: list[tuple[str, str]]
    table: tables.Table | None
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
    if target.is_dir():
        raise ToolkitError(f"{target} is a directory; name the HTML file to write")
    try:
        groups = {path: open_runs(path) for path in runs}
        with hold_path(target):
            page = render(_unique_names(groups), " and ".join(map(directory_name, groups)))
            write_text(target, UNPRINTABLE.sub("\ufffd", page))
    except OSError as error:
        raise ToolkitError(f"{error.filename or target}: {error.strerror or error}") from error
    return target


def render(runs: Sequence[Run], heading: str) -> str:
    """The page's HTML about `runs`, whose names are unique."""
    chains = [run for run in runs if run.is_chain]
    titles = _titles(runs)
    return render_page(
        "report.html.jinja",
        heading=heading,
        chains=[_chain_view(run) for run in chains],
        across=tables.across(chains),
        runs=[_run_view(run, titles[run.name]) for run in runs],
        notes=[(run.name, titles[run.name], note) for run in runs for note in run.notes],
        gallery=across_runs(runs, titles),
        load_classes=LOAD_CLASSES,
        anchor=partial(_anchor, [run.name for run in runs]),
        count=count,
    )


def _unique_names(groups: Mapping[Path, list[Run]]) -> list[Run]:
    """All runs. With several directories a run inside one is named with it; equal names get numbers."""
    taken: set[str] = set()
    for path, group in groups.items():
        for run in group:
            base = run.name if len(groups) == 1 or run.path == path else f"{directory_name(path)}/{run.name}"
            numbered = (base if k == 1 else f"{base} ({k})" for k in count_up(1))
            run.name = next(name for name in numbered if name not in taken)
            taken.add(run.name)
    return [run for group in groups.values() for run in group]


def _titles(runs: Sequence[Run]) -> dict[str, str]:
    """Each run's name for the eye. An evaluation whose figures go to `stages.sft` is titled after that stage."""
    told = {}
    for chain in runs:
        stages = chain.recipe.get("stages")
        for stage in stages if isinstance(stages, list) else []:
            section, _, entry = str(stage.get("results", "") if isinstance(stage, dict) else "").partition(".")
            if section == "stages":
                told[chain.path / str(stage.get("name"))] = tables.stage_name(entry)
    found = [(run, told.get(run.path, tables.stage_name(run.name))) for run in runs]
    shared = Counter((run.kind, title) for run, title in found)
    return {run.name: title if shared[run.kind, title] == 1 else f"{title} ({run.name})" for run, title in found}


def _anchor(names: Sequence[str], name: str) -> str:
    """An id that no name can break out of."""
    return f"run-{names.index(name)}"


def _chain_view(run: Run) -> ChainView:
    results = run.results
    stages, models = (tables.entries(results, section) for section in ("stages", "reward_models"))
    found = [
        tables.shares_table("Stages", stages, tables.STAGE_NAMES),
        tables.changes(results),
        tables.shares_table("Reward models", models, {}),
        tables.targets(results),
    ]
    return ChainView(run, words.facts(results), [t for t in found if t], tables.other_results(results))


def _run_view(run: Run, title: str) -> RunView:
    main, other = charts(run.metrics)
    flat = words.flatten(run.manifest)
    return RunView(
        run=run,
        heading=f"Evaluation: {title}" if run.kind == "eval" else title,
        kind=KINDS.get(run.kind, run.kind),
        figures=[_figure(chart) for chart in main],
        maps=expert_maps(run.metrics),
        other=[_figure(chart) for chart in other],
        loose=words.flatten(run.metrics.loose),
        table=None if run.is_chain else tables.shares_table("Figures", {title: run.results}, {}),
        rejected=_rejected(run),
        brief=words.brief(run.manifest),
        facts=[pair for pair in flat if len(pair[1]) <= LONG_TEXT and "\n" not in pair[1]],
        texts=[pair for pair in flat if len(pair[1]) > LONG_TEXT or "\n" in pair[1]],
        samples=within_run(run),
    )


def _rejected(run: Run) -> list[tuple[str, str]]:
    """Reasons why rows were left out, the most frequent first; what is beyond REASONS is summed up."""
    found = run.rejected.most_common()
    listed = [(reason, count(n, "row")) for reason, n in found[:REASONS]]
    rest = found[REASONS:]
    more = [(f"{count(len(rest), 'other reason')}", count(sum(n for _, n in rest), "row"))] if rest else []
    return listed + more


def _figure(chart: Chart) -> Figure:
    legend = [
        (index % COLOURS, index >= COLOURS, line.label, short(drawn(line)[-1][1]))
        for index, line in enumerate(chart.lines)
    ]
    return Figure(chart.title, line_chart(chart), legend, caption(chart))
