"""Makes docs/api.md from signatures and docstrings. Nothing that it documents is imported.

python docs/make_api.py
"""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
PACKAGES = (
    "deepseek_v2_modeling",
    "deepseek_v2_modeling.adapters",
    "deepseek_v2_modeling.esft",
    "deepseek_v2_modeling.inference",
    "deepseek_v2_modeling.loading",
    "deepseek_v2_modeling.training",
    "conversations",
)
HEAD = """# Python API

Generated from signatures and docstrings by `docs/make_api.py`; `make api` updates it. The other packages use
`deepseek_v2_modeling` through these six names; `conversations` reads rows, renders them and judges answers. Keys of
recipes are on [a page of their own](keys.md). Anything not listed here may change.
"""
WIDTH = 100


def text(docstring: griffe.Docstring | None) -> str:
    """A docstring as Markdown: its sections as lists."""
    if docstring is None:
        return ""
    paragraphs = []
    for section in docstring.parse("google", warnings=False):
        if section.kind is griffe.DocstringSectionKind.text:
            paragraphs.append(section.value)
        elif isinstance(section.value, list):
            paragraphs += [f"{section.kind.value.capitalize()}:", "\n".join(map(item, section.value))]
    return "\n\n".join(paragraphs)


def item(entry: Any) -> str:
    """A list item for a parameter, an exception or a return value."""
    name = getattr(entry, "name", "") or entry.annotation
    words = " ".join(entry.description.split())
    return f"- `{name}`: {words}" if name else f"- {words}"


def entry(name: str, target: griffe.Object, level: str = "###") -> Iterator[str]:
    """A name with its signature, its docstring and, for a class, its documented methods."""
    yield f"{level} `{name}`"
    if target.is_function or (target.is_class and "__init__" in target.members):
        signature = target.signature(name=name.rpartition(".")[2])
        yield f"```python\n{wrapped(signature.removesuffix(' -> None') if target.is_class else signature)}\n```"
    if words := text(target.docstring):
        yield words
    for key, member in target.members.items() if target.is_class else ():
        if member.is_function and member.docstring and not key.startswith("_"):
            yield from entry(f"{name}.{key}", member, "####")


def wrapped(signature: str) -> str:
    """A long signature with a line for each parameter."""
    if len(signature) <= WIDTH:
        return signature
    depth, start, lines = 0, signature.index("(") + 1, [signature[: signature.index("(") + 1]]
    for place, letter in enumerate(signature):
        depth += (letter in "([{") - (letter in ")]}")
        if (depth, letter) in ((1, ","), (0, ")")):
            lines.append(f"    {signature[start:place].strip()},")
            start = place + 1
        if depth == 0 and letter == ")":
            return "\n".join([*lines, signature[place:]])
    return signature


def public(module: griffe.Module) -> list[str]:
    if module.exports is not None:
        return sorted(map(str, module.exports), key=str.lower)
    return [name for name, member in module.members.items() if member.is_public and not member.is_alias]


def section(name: str, module: griffe.Module, documented: set[str]) -> Iterator[str]:
    """All documented names not listed before, and the names of the rest (constants, types)."""
    yield f"## {name}"
    yield text(module.docstring)
    rest = []
    for key in public(module):
        target = module[key]
        try:
            target = target.final_target if target.is_alias else target
        except griffe.AliasResolutionError:  # from another library, or an element of a tuple
            target = None
        if target is None or not target.docstring or target.path in documented:
            rest.append(key)
            continue
        documented.add(target.path)
        yield from entry(key, target)
    if rest:
        yield f"Other names: {', '.join(f'`{key}`' for key in rest)}."


def page() -> str:
    """The whole page."""
    logging.getLogger("griffe").setLevel(logging.ERROR)
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)])
    for name in PACKAGES:
        loader.load(name.partition(".")[0])
    paragraphs, documented = [HEAD.strip()], set[str]()
    for name in PACKAGES:
        paragraphs += section(name, loader.modules_collection[name], documented)
    return "\n\n".join(part for part in paragraphs if part) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page(), encoding="utf-8")
