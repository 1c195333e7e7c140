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

Made from signatures and docstrings by `docs/make_api.py`; `make api` makes it again. The floors above use
`deepseek_v2_modeling` through these six names; `conversations` reads rows, renders them and judges answers; recipes and
their sections have the keys at the end. What is not here may change.
"""
WIDTH = 100


def text(docstring: griffe.Docstring | None) -> str:
    """A docstring as Markdown: its sections as lists."""
    if docstring is None:
        return ""
    parts = []
    for section in docstring.parse("google", warnings=False):
        if section.kind is griffe.DocstringSectionKind.text:
            parts.append(section.value)
        elif isinstance(section.value, list):
            parts += [f"{section.kind.value.capitalize()}:", "\n".join(map(item, section.value))]
    return "\n\n".join(parts)


def item(entry: Any) -> str:
    """A parameter, an exception or what is returned."""
    name = getattr(entry, "name", "") or entry.annotation
    words = " ".join(entry.description.split())
    return f"- `{name}`: {words}" if name else f"- {words}"


def entry(name: str, found: griffe.Object, level: str = "###") -> Iterator[str]:
    """A name with its signature, its docstring and, of a class, its documented methods."""
    yield f"{level} `{name}`"
    if found.is_function or (found.is_class and "__init__" in found.members):
        signature = found.signature(name=name.rpartition(".")[2])
        yield f"```python\n{wrapped(signature.removesuffix(' -> None') if found.is_class else signature)}\n```"
    if words := text(found.docstring):
        yield words
    for key, member in found.members.items() if found.is_class else ():
        if member.is_function and member.docstring and not key.startswith("_"):
            yield from entry(f"{name}.{key}", member, "####")


def wrapped(signature: str) -> str:
    """A long signature with a line for each parameter."""
    if len(signature) <= WIDTH:
        return signature
    depth, start, parts = 0, signature.index("(") + 1, [signature[: signature.index("(") + 1]]
    for place, letter in enumerate(signature):
        depth += (letter in "([{") - (letter in ")]}")
        if (depth, letter) in ((1, ","), (0, ")")):
            parts.append(f"    {signature[start:place].strip()},")
            start = place + 1
        if depth == 0 and letter == ")":
            return "\n".join([*parts, signature[place:]])
    return signature


def public(module: griffe.Module) -> list[str]:
    if module.exports is not None:
        return sorted(map(str, module.exports), key=str.lower)
    return [name for name, member in module.members.items() if member.is_public and not member.is_alias]


def section(name: str, module: griffe.Module, seen: set[str]) -> Iterator[str]:
    """What has a docstring and was not seen before, and the names of the rest (constants, types)."""
    yield f"## {name}"
    yield text(module.docstring)
    rest = []
    for key in public(module):
        found = module[key]
        try:
            found = found.final_target if found.is_alias else found
        except griffe.AliasResolutionError:  # of another library, or a part of a tuple
            found = None
        if found is None or not found.docstring or found.path in seen:
            rest.append(key)
            continue
        seen.add(found.path)
        yield from entry(key, found)
    if rest:
        yield f"Also here: {', '.join(f'`{key}`' for key in rest)}."


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
    return f"- `{key}`: `{annotation}`{given(field)}. {field.description}"


def given(field: Any) -> str:
    """What a key is where a recipe does not name it; a section then has the defaults of its own keys."""
    if field.is_required():
        return ", required"
    default = field.get_default(call_default_factory=True)
    return "" if isinstance(default, BaseModel) else f", default `{json.dumps(default)}`"


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections_in(part)]


def recipes() -> list[type[BaseModel]]:
    """Those of the stages, then the sections that they have."""
    found: list[type[BaseModel]] = [stage.recipe for stage in stages().values()]
    for model in found:  # grows meanwhile
        inner = [part for field in model.model_fields.values() for part in sections_in(field.annotation)]
        found.extend(part for part in dict.fromkeys(inner) if part not in found)
    return found


def page() -> str:
    """The whole page."""
    logging.getLogger("griffe").setLevel(logging.ERROR)
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)])
    for name in (*PACKAGES, *FOLDERS):
        loader.load(name.partition(".")[0])
    parts, seen = [HEAD.strip()], set[str]()
    for name in PACKAGES:
        parts += section(name, loader.modules_collection[name], seen)
    parts.append("## Recipes")
    for model in recipes():
        parts += keys(model, loader)
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page(), encoding="utf-8")
