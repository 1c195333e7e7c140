"""The page of `dsv2 report`: one self-contained HTML file about one or more runs. No scripts, no network, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count as count_up
from pathlib import Path
from typing import Any

from markupsafe import Markup

from conversations.errors import ToolkitError
from conversations.run_files import REPORT
from recipes.files import write_text
from recipes.html import policy_of, render_page, template_text
from recipes.lock import hold_path
from recipes.report.chain_picture import BASE, Shown, chain_nodes, draw_chain
from recipes.report.expert_maps import expert_maps
from recipes.report.plots import figures
from recipes.report.relations import score_charts
from recipes.report.run_files import Run, directory_name, open_runs
from recipes.report.samples import Answers, Gallery, across_runs, answers, best_and_worst, of_one_step, within_run
from recipes.report.svg import LOAD_CLASSES, Drawn, draw
from recipes.results import tables, words
from recipes.results.layout import Table
from recipes.results.titles import Titles, titles_of
from recipes.results.words import count
from recipes.stages import stage_written

LONG_TEXT = 300
REASONS = 12


@dataclass(frozen=True)
class ChainView:
    """The headline of a chain or of an evaluation of several models: facts, how its models were made (if it made any),
    tables, and whatever else its results hold."""

    run: Run
    facts: list[tuple[str, str]]
    picture: Markup
    tables: list[Table]
    rest: list[tuple[str, str]]


@dataclass(frozen=True)
class RunView:
    """A run as shown on the page. Its manifest: a `brief`, and all of it as short `facts` and long `texts`."""

    run: Run
    anchor: str
    heading: str
    kind: str
    figures: list[Drawn]
    maps: list[tuple[str, Markup]]
    other: list[Drawn]
    loose: list[tuple[str, str]]
    tables: list[Table]
    rejected: list[tuple[str, str]]
    brief: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    texts: list[tuple[str, str]]
    samples: Gallery | None


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about `runs` (directories of stages or chains) and return its path.

    `out` defaults to report.html in the first run. The page is written atomically. The same runs give the same bytes.
    Anything missing or unreadable in a run is noted on the page.

    Raises:
        ToolkitError: there are no runs, a directory does not hold one, or `out` cannot be written.
    """
    if not runs:
        raise ToolkitError("no run to report on; pass the output_dir of a stage or of a chain")
    target = out if out is not None else runs[0] / REPORT
    if target.is_dir():
        raise ToolkitError(f"{target} is a directory; pass the HTML file to write")
    page = report_page(runs)
    try:
        with hold_path(target):
            write_text(target, page)
    except OSError as error:
        raise ToolkitError(f"{error.filename or target}: {error.strerror or error}") from error
    return target


def report_page(runs: Sequence[Path], watched: bool = False) -> str:
    """The page about `runs`, as HTML.

    watched: it renews itself from where it is served, with the one script that its policy allows.

    Raises:
        ToolkitError: a directory does not hold a run, or a file of one cannot be opened.
    """
    try:
        groups = {path: open_runs(path) for path in runs}
    except OSError as error:
        raise ToolkitError(f"{error.filename}: {error.strerror or error}") from error
    script = template_text("watch.js") if watched else ""
    return render_page("report.html.jinja", **_content(groups), script=Markup(script), policy=policy_of(script))


def _content(groups: Mapping[Path, list[Run]]) -> dict[str, Any]:
    """What the page's template shows."""
    runs = _unique_names(groups)
    chains = [(run, titles_of(run.recipe)) for run in runs if run.is_summary]
    about = {chain.path / name: title for chain, titles in chains for name, title in titles.stages.items()}
    subjects = {run.name: about.get(run.path, run.name) for run in runs}
    titles = _titles(runs, subjects)
    anchors = {run.name: f"run-{index}" for index, run in enumerate(runs)}  # safe whatever the run's name is
    answers_of = {run.name: answers(run.samples) for run in runs}
    side_by_side = across_runs([(titles[name], run_answers) for name, run_answers in answers_of.items()])
    beside = side_by_side.columns if side_by_side else ()
    views = [
        _run_view(run, titles[run.name], anchors[run.name], answers_of[run.name], titles[run.name] not in beside)
        for run in runs
    ]
    galleries = [gallery for gallery in (side_by_side, *(view.samples for view in views)) if gallery]
    return {
        "heading": " and ".join(map(directory_name, groups)),
        "contents": _contents(views, subjects),
        "chains": [_chain_view(*chain, views) for chain in chains],
        "across": _across(chains),
        "runs": views,
        "notes": [(view, note) for view in views for note in view.run.notes],
        "gallery": side_by_side,
        "filter_classes": sorted({name for gallery in galleries for group in gallery.filters for name, _, _ in group}),
        "load_classes": LOAD_CLASSES,
        "count": count,
    }


def _unique_names(groups: Mapping[Path, list[Run]]) -> list[Run]:
    """All runs with unique names: if there are several directories, prefixed with theirs; equal names get numbers."""
    used: set[str] = set()
    for path, group in groups.items():
        for run in group:
            base = run.name if len(groups) == 1 or run.path == path else f"{directory_name(path)}/{run.name}"
            numbered = (base if k == 1 else f"{base} ({k})" for k in count_up(1))
            run.name = next(name for name in numbered if name not in used)
            used.add(run.name)
    return [run for group in groups.values() for run in group]


def _titles(runs: Sequence[Run], subjects: Mapping[str, str]) -> dict[str, str]:
    """The title of each run: its subject, with its name added if several runs of one kind share the subject."""
    shared = Counter((run.kind, subjects[run.name]) for run in runs)

    def title(run: Run) -> str:
        subject = subjects[run.name]
        return f"{subject} ({run.name})" if shared[run.kind, subject] > 1 else subject

    return {run.name: title(run) for run in runs}


def _contents(views: Sequence[RunView], subjects: Mapping[str, str]) -> list[tuple[str, list[RunView]]]:
    """The runs by subject, in order: the training and the evaluation of a stage appear together."""
    by_subject: dict[tuple[Path, str], list[RunView]] = {}
    for view in views:
        by_subject.setdefault((view.run.path.parent, subjects[view.run.name]), []).append(view)
    return [(subject, about) for (_, subject), about in by_subject.items()]


def _across(chains: Sequence[tuple[Run, Titles]]) -> Table | None:
    """The table of several chains, with the titles of the first that has one."""
    of_all = [titles for _, titles in reversed(chains)]
    stages = {entry: title for titles in of_all for entry, title in titles.section("stages").items()}
    tasks = {task: title for titles in of_all for task, title in titles.tasks.items()}
    return tables.across([run.results for run, _ in chains], stages, tasks)


def _chain_view(run: Run, titles: Titles, views: Sequence[RunView]) -> ChainView:
    nodes = chain_nodes(run.recipe, titles.stages)
    inside = {view.run.path.name: view for view in views if view.run.path.parent == run.path}
    shown = {name: Shown(view.kind, _unfinished(view.run), view.anchor) for name, view in inside.items()}
    picture = draw_chain(nodes, {**shown, BASE: Shown("base model")}) if nodes else Markup("")
    headline_tables = tables.headline(run.results, titles)
    spent = {key: run.manifest[key] for key in ("seconds", "peak_memory_gb") if key in run.manifest}
    return ChainView(
        run, words.facts({**spent, **run.results}), picture, headline_tables, tables.other_results(run.results)
    )


def _unfinished(run: Run) -> str:
    """The status of a run that has not finished, in a word."""
    status = str(run.manifest.get("status", "unknown"))
    return "" if status == "finished" else status.partition(":")[0]


def _run_view(run: Run, title: str, anchor: str, answers_of_run: Answers, alone: bool) -> RunView:
    """alone: whether its answers are not shown beside those of other runs."""
    main, other = figures(run.metrics)
    main += [draw(chart) for chart in score_charts(run.samples)]
    flat, stage = words.flatten(run.manifest), stage_written({**run.recipe, "stage": run.kind})
    return RunView(
        run=run,
        anchor=anchor,
        heading=f"{stage.title.capitalize()}: {title}" if stage and stage.measures else title,
        kind=stage.title if stage else run.kind,
        figures=main,
        maps=expert_maps(run.metrics),
        other=other,
        loose=words.flatten(run.metrics.loose),
        tables=[] if run.is_summary else _figures_tables(run, title),
        rejected=_rejected(run),
        brief=words.brief(run.manifest),
        facts=[pair for pair in flat if len(pair[1]) <= LONG_TEXT and "\n" not in pair[1]],
        texts=[pair for pair in flat if len(pair[1]) > LONG_TEXT or "\n" in pair[1]],
        samples=within_run(answers_of_run)
        or best_and_worst(run.samples)
        or (of_one_step(answers_of_run) if alone else None),
    )


def _figures_tables(run: Run, title: str) -> list[Table]:
    table = tables.figures_table("Figures", {title: run.results}, {}, {})
    return [*([table] if table else []), *tables.detail_tables("Figures", run.results, {})]


def _rejected(run: Run) -> list[tuple[str, str]]:
    """Why rows were left out, the most frequent reasons first; those beyond REASONS are combined."""
    reasons = run.rejected.most_common()
    listed = [(reason, count(n, "row")) for reason, n in reasons[:REASONS]]
    rest = reasons[REASONS:]
    more = [(f"{count(len(rest), 'other reason')}", count(sum(n for _, n in rest), "row"))] if rest else []
    return listed + more
