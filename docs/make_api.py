"""Makes docs/api.md from signatures and docstrings. Of what it documents only the recipes are imported.

python docs/make_api.py
"""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import griffe
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from recipes.stages import FOLDERS, stages  # noqa: E402

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
`deepseek_v2_modeling` through these six names; `conversations` reads rows, renders them and judges answers; the keys of
recipes and their sections are at the end. Anything not listed here may change.
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


def keys(model: type[BaseModel], loader: griffe.GriffeLoader) -> Iterator[str]:
    """A recipe, or a section of one, with its keys."""
    yield f"### `{model.__name__}`"
    yield text(loader.modules_collection[f"{model.__module__}.{model.__name__}"].docstring)
    yield "\n".join(key_line(model, key, field, loader) for key, field in model.model_fields.items())


def key_line(model: type[BaseModel], key: str, field: Any, loader: griffe.GriffeLoader) -> str:
    owners = (
        loader.modules_collection[f"{c.__module__}.{c.__name__}"] for c in model.__mro__ if key in c.__annotations__
    )
    annotation = next(owners).members[key].annotation
    return f"- `{key}`: `{annotation}`{default_text(field)}. {field.description}"


def default_text(field: Any) -> str:
    """The default of a key, as text; a section has the defaults of its own keys."""
    if field.is_required():
        return ", required"
    default = field.get_default(call_default_factory=True)
    return "" if isinstance(default, BaseModel) else f", default `{json.dumps(default)}`"


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def recipes() -> list[type[BaseModel]]:
    """The recipe classes of all stages, then the sections that they contain."""
    models: list[type[BaseModel]] = [stage.recipe for stage in stages().values()]
    for model in models:  # grows while it is iterated over
        inner = [part for field in model.model_fields.values() for part in sections_in(field.annotation)]
        models.extend(part for part in dict.fromkeys(inner) if part not in models)
    return models


def page() -> str:
    """The whole page."""
    logging.getLogger("griffe").setLevel(logging.ERROR)
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)])
    for name in (*PACKAGES, *FOLDERS):
        loader.load(name.partition(".")[0])
    paragraphs, documented = [HEAD.strip()], set[str]()
    for name in PACKAGES:
        paragraphs += section(name, loader.modules_collection[name], documented)
    paragraphs.append("## Recipes")
    for model in recipes():
        paragraphs += keys(model, loader)
    return "\n\n".join(part for part in paragraphs if part) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page(), encoding="utf-8")
