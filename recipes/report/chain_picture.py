"""A chain as a picture: a box for each model, an arrow from what it was made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from recipes.report.svg import WIDTH, join, svg, tag

PER_ROW = 3
BOX_WIDTH, BOX_HEIGHT, GAP = 122.0, 46.0, 34.0
LINE, SMALL_LINE = 19, 23  # characters that fit in a box, of a title and of what stands below it
BASE = ""  # the node of the model that the chain begins with
_REFERENCE = re.compile(r"\$\{([^}./]+)")


@dataclass(frozen=True)
class Node:
    """A model of the chain. `parent`: what it starts from; `uses`: what else it is made with (reward models, data)."""

    name: str
    title: str
    parent: str | None
    uses: Sequence[str] = ()


@dataclass(frozen=True)
class Shown:
    """What a box says of a stage: its kind, its status where it has not finished, and the anchor of its run."""

    kind: str
    status: str = ""
    anchor: str = ""


class _Place(NamedTuple):
    """Where a box is: its row, and its middle."""

    row: int
    x: float


def chain_nodes(recipe: Mapping[str, Any], titles: Mapping[str, str]) -> list[Node]:
    """The base model and the chain's stages but for those that only measure, in the recipe's order."""
    stages = recipe.get("stages")
    listed = (
        [stage for stage in stages if isinstance(stage, dict) and "name" in stage] if isinstance(stages, list) else []
    )
    made = {str(stage["name"]): stage for stage in listed if not stage.get("results")}
    base = recipe.get("model")
    nodes = [Node(BASE, _name_of(base), None)]
    for name, stage in made.items():
        model, rest = stage.get("model"), {key: value for key, value in stage.items() if key != "model"}
        parent = next((named for named in _references(model) if named in made), BASE)
        uses = [named for named in _references(rest) if named in made and named != name]
        nodes.append(Node(name, titles.get(name, name), parent, tuple(dict.fromkeys(uses))))
    return nodes if len(nodes) > 1 else []


def draw_chain(nodes: Sequence[Node], shown: Mapping[str, Shown]) -> Markup:
    """The picture: rows from top to bottom, each below all that it is made of."""
    rows = _rows(nodes)
    places, height = _place(rows), _top(len(rows)) - GAP + 1
    arrows = [arrow for node in nodes for arrow in _arrows(node, places, rows)]
    boxes = [_box(node, places[node.name], shown.get(node.name, Shown("", "not begun"))) for node in nodes]
    return svg([*arrows, *boxes], height, _in_words(nodes))


def _references(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [name for item in inner for name in _references(item)]
    return _REFERENCE.findall(value) if isinstance(value, str) else []


def _name_of(model: Any) -> str:
    stated = model if isinstance(model, dict) else {}
    preset = f" ({stated['preset']})" if stated.get("preset") else ""
    return f"{str(stated.get('path', 'base model')).rstrip('/').rpartition('/')[2]}{preset}"


def _rows(nodes: Sequence[Node]) -> list[list[str]]:
    """The names in each row of the picture, each below all that it is made of. A reference to a later stage, which no
    chain has, counts for nothing."""
    depth: dict[str, int] = {}
    for node in nodes:
        depth[node.name] = 1 + max((depth.get(name, -1) for name in _sources(node)), default=-1)
    rows: list[list[str]] = []
    for level in range(max(depth.values()) + 1):
        names = [name for name, of in depth.items() if of == level]
        rows += [names[start : start + PER_ROW] for start in range(0, len(names), PER_ROW)]
    return rows


def _place(rows: Sequence[Sequence[str]]) -> dict[str, _Place]:
    return {
        name: _Place(row, (column + 0.5) * WIDTH / len(names))
        for row, names in enumerate(rows)
        for column, name in enumerate(names)
    }


def _top(row: float) -> float:
    return 1 + row * (BOX_HEIGHT + GAP)


def _sources(node: Node) -> list[str]:
    return [*([] if node.parent is None else [node.parent]), *(name for name in node.uses if name != node.parent)]


def _arrows(node: Node, places: Mapping[str, _Place], rows: Sequence[Sequence[str]]) -> list[Markup]:
    """Side by side where they end, from left to right as they come."""
    to = places[node.name]
    sources = sorted((name for name in _sources(node) if name in places), key=lambda name: places[name].x)
    drawn = []
    for number, name in enumerate(sources):
        start, x = places[name], to.x + BOX_WIDTH * ((number + 1) / (len(sources) + 1) - 0.5)
        if start.row < to.row:
            kind = "arrow" if name == node.parent else "arrow uses"
            head = f"M{x - 3:.1f} {_top(to.row) - 6:.1f}l3 5l3 -5"
            drawn += [tag("path", d=_way(start, to.row, x, rows), class_=kind), tag("path", d=head, class_="arrow")]
    return drawn


def _way(start: _Place, row: int, x: float, rows: Sequence[Sequence[str]]) -> str:
    """A curve from below a box to x above a row, between the boxes of the rows that it passes."""
    way, here, y = f"M{start.x:.1f} {_top(start.row) + BOX_HEIGHT:.1f}", start.x, _top(start.row) + BOX_HEIGHT
    for passed in range(start.row + 1, row + 1):
        straight = start.x + (x - start.x) * (passed - start.row) / (row - start.row)
        there = x if passed == row else min(_gaps(len(rows[passed])), key=lambda gap: abs(gap - straight))
        below, middle = _top(passed) - 1, (y + _top(passed)) / 2
        way += f"C{here:.1f} {middle:.1f} {there:.1f} {middle:.1f} {there:.1f} {below:.1f}"
        here, y = there, below + BOX_HEIGHT + 2
        way += f"V{y:.1f}" if passed < row else ""
    return way


def _gaps(boxes: int) -> list[float]:
    """The middles of what is free beside and between the boxes of a row."""
    margin = (WIDTH / boxes - BOX_WIDTH) / 4
    return [margin, *(number * WIDTH / boxes for number in range(1, boxes)), WIDTH - margin]


def _box(node: Node, place: _Place, shown: Shown) -> Markup:
    left, top = place.x - BOX_WIDTH / 2, _top(place.row)
    state = "box-of" if not shown.status else "box-of waiting" if shown.status == "not begun" else "box-of open"
    shape = tag("rect", x=f"{left:.1f}", y=f"{top:.1f}", width=BOX_WIDTH, height=BOX_HEIGHT, rx=5, class_=state)
    lines = [*((line, "title") for line in _wrapped(node.title)), (_clip(shown.status or shown.kind, SMALL_LINE), "")]
    first = top + BOX_HEIGHT / 2 - 6.5 * (len(lines) - 1) + 4
    texts = [
        tag("text", line, x=f"{place.x:.1f}", y=f"{first + 13 * number:.1f}", class_=f"mid {kind}".strip())
        for number, (line, kind) in enumerate(lines)
        if line
    ]
    inside = join([tag("title", f"{node.title}: {shown.status or shown.kind}"), shape, *texts])
    return tag("a", inside, href=f"#{shown.anchor}") if shown.anchor else tag("g", inside)


def _wrapped(title: str) -> list[str]:
    """One or two lines that fit in a box."""
    words, lines = title.split(), [""]
    for word in words:
        fits = _width(f"{lines[-1]} {word}") <= LINE
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if fits else [*lines, word]
    lines = [line for line in lines if line]
    return [_clip(line) for line in lines] if len(lines) <= 2 else [_clip(lines[0]), _clip(" ".join(lines[1:]))]


def _clip(text: str, most: int = LINE) -> str:
    kept = text
    while _width(kept) > most:
        kept = kept[:-1]
    return kept if kept == text else f"{kept[:-1]}…"


def _width(text: str) -> int:
    """In characters of Latin script; others are twice as wide."""
    return sum(1 if ord(character) < 0x1100 else 2 for character in text)


def _in_words(nodes: Sequence[Node]) -> str:
    titles = {node.name: node.title for node in nodes}
    made = []
    for node in nodes:
        if node.parent is not None:
            more = [titles[name] for name in node.uses if name in titles]
            made.append(f"{node.title} from {titles[node.parent]}" + (f" with {', '.join(more)}" if more else ""))
    return f"The chain: {'; '.join(made)}"
