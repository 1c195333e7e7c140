"""A chain as a picture: a box for each model, an arrow from what it was made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from recipes.report.svg import WIDTH, join, svg, tag

PER_ROW = 3
BOX_WIDTH, BOX_HEIGHT, GAP = 124.0, 46.0, 26.0
LINE = 20  # characters that fit in a box
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
    """Where a box is: the middle of its upper edge."""

    x: float
    y: float


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
    places, height = _places(nodes)
    arrows = [arrow for node in nodes for arrow in _arrows(node, places)]
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


def _places(nodes: Sequence[Node]) -> tuple[dict[str, _Place], float]:
    """Where each box is, and the height of the picture. A reference to a later stage, which no chain has, is left
    out."""
    depth: dict[str, int] = {}
    for node in nodes:
        depth[node.name] = 1 + max((depth.get(name, -1) for name in _sources(node)), default=-1)
    rows: list[list[str]] = []
    for level in range(max(depth.values()) + 1):
        names = [name for name, of in depth.items() if of == level]
        rows += [names[start : start + PER_ROW] for start in range(0, len(names), PER_ROW)]
    places = {}
    for number, names in enumerate(rows):
        room = WIDTH / len(names)
        for column, name in enumerate(names):
            places[name] = _Place((column + 0.5) * room, 1 + number * (BOX_HEIGHT + GAP))
    return places, len(rows) * (BOX_HEIGHT + GAP) - GAP + 2


def _sources(node: Node) -> list[str]:
    return [*([] if node.parent is None else [node.parent]), *(name for name in node.uses if name != node.parent)]


def _arrows(node: Node, places: Mapping[str, _Place]) -> list[Markup]:
    """Side by side where they end, from left to right as they come."""
    to = places[node.name]
    sources = sorted((name for name in _sources(node) if name in places), key=lambda name: places[name].x)
    drawn = []
    for number, name in enumerate(sources):
        start, x = places[name], to.x + BOX_WIDTH * ((number + 1) / (len(sources) + 1) - 0.5)
        if start.y >= to.y:
            continue
        top, y = start.y + BOX_HEIGHT, to.y - 1
        bend = f"M{start.x:.1f} {top:.1f}C{start.x:.1f} {y - 2:.1f} {x:.1f} {top:.1f} {x:.1f} {y:.1f}"
        kind = "arrow" if name == node.parent else "arrow uses"
        drawn += [tag("path", d=bend, class_=kind), tag("path", d=f"M{x - 3:.1f} {y - 5:.1f}l3 5l3 -5", class_="arrow")]
    return drawn


def _box(node: Node, place: _Place, shown: Shown) -> Markup:
    left = place.x - BOX_WIDTH / 2
    state = "box-of" if not shown.status else "box-of waiting" if shown.status == "not begun" else "box-of open"
    shape = tag("rect", x=f"{left:.1f}", y=place.y, width=BOX_WIDTH, height=BOX_HEIGHT, rx=5, class_=state)
    lines = [*((line, "title") for line in _wrapped(node.title)), (_clip(shown.status or shown.kind), "")]
    first = place.y + BOX_HEIGHT / 2 - 6.5 * (len(lines) - 1) + 4
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


def _clip(text: str) -> str:
    kept = text
    while _width(kept) > LINE:
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
