"""Makes docs/keys.md from the schema of recipes, docs/commands.md from the arguments of the command line, and
docs/chain.svg from the demo's chain.

python docs/make_reference.py [DIRECTORY]
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from recipes.cli import Command, commands  # noqa: E402
from recipes.launch import launch_arguments  # noqa: E402
from recipes.recipe.schema import ChainRecipe  # noqa: E402
from recipes.recipe.yaml_text import read_mapping  # noqa: E402
from recipes.report.chain_picture import BASE, Shown, chain_nodes, draw_chain  # noqa: E402
from recipes.results.titles import titles_of  # noqa: E402
from recipes.stages import stages  # noqa: E402

Schema = Mapping[str, Any]
KEYS = """# Keys of recipes

Generated from the schema that recipes are checked against, by `docs/make_reference.py`; `make api` updates it.
[Recipes](recipes.md) explains how a recipe is written, overridden and run. `training` takes the fields of the stage's
TRL config.
"""
COMMANDS = """# Commands

Generated from the command line's own declarations by `docs/make_reference.py`; `make api` updates it. `dsv2 COMMAND
--help` says the same. Exit codes, overrides and run directories are described in [Recipes](recipes.md).
"""
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "over {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "not empty",
    "minItems": "at least {} of them",
    "pattern": "`{}`",
}


# Readable on light and on dark.
STYLE = (
    "text{font:10px system-ui,sans-serif;fill:#57606a;text-anchor:middle}"
    ".title{font-weight:600;font-size:11px;fill:#1b1f24}"
    ".box-of{fill:#f6f7f9;stroke:#7d8790}.arrow{fill:none;stroke:#7d8790;stroke-width:1.3}.uses{stroke-dasharray:4 3}"
)


# --- recipes -----------------------------------------------------------------------------------------------------


def keys_page() -> str:
    """Every recipe by stage, then the sections that they share."""
    schemas = {stage.name: stage.recipe.model_json_schema() for stage in stages().values()}
    schemas["chain"] = ChainRecipe.model_json_schema()
    sections = {name: section for schema in schemas.values() for name, section in schema.get("$defs", {}).items()}
    parts = [KEYS.strip()]
    for name, schema in schemas.items():
        parts += [f"## Recipes of stage {name}", *keys(schema)]
    parts.append("## Sections")
    for name, section in sections.items():
        parts += [f"### {name}", *keys(section)]
    return "\n\n".join(parts) + "\n"


def keys(schema: Schema) -> Iterator[str]:
    """The description of an object and a list of its keys."""
    if "description" in schema:
        yield prose(schema["description"])
    required = schema.get("required", ())
    yield "\n".join(key(name, stated, name in required) for name, stated in schema.get("properties", {}).items())


def key(name: str, schema: Schema, required: bool) -> str:
    default = "required" if required else f"default `{json.dumps(schema['default'])}`" if "default" in schema else ""
    facts = ", ".join(fact for fact in (kind(schema), default) if fact)
    return f"- `{name}`: {facts}. {prose(schema.get('description', ''))}".rstrip()


def kind(schema: Schema) -> str:
    """What a value may be, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(map(kind, schema[several])))
    bounds = [words.format(schema[name]) for name, words in BOUNDS.items() if name in schema]
    return " ".join([plain_kind(schema), *([f"({', '.join(bounds)})"] if bounds else [])])


def plain_kind(schema: Schema) -> str:
    """The kind of a value without its bounds."""
    stated = schema.get("type", "any value")
    if stated == "array":
        return f"list of {kind(schema.get('items', {}))}"
    if stated == "object" and isinstance(inner := schema.get("additionalProperties"), dict):
        return f"mapping of names to {kind(inner)}"
    return {"object": "mapping", "boolean": "true or false", "string": "text"}.get(stated, stated)


def prose(text: str) -> str:
    """Text in which Markdown would see no HTML."""
    return " ".join(text.split()).replace("<", "\\<")


# --- commands ----------------------------------------------------------------------------------------------------


class Declared:
    """Stands for a parser: keeps the arguments that a command declares."""

    def __init__(self) -> None:
        self.arguments: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def add_argument(self, *names: str, **stated: Any) -> None:
        self.arguments.append((names, stated))


def commands_page() -> str:
    """Every command with its arguments."""
    parts = [COMMANDS.strip()]
    for name, command in commands().items():
        parts += command_section(name, command)
    return "\n\n".join(parts) + "\n"


def command_section(name: str, command: Command) -> Iterator[str]:
    declared: Any = Declared()
    command.arguments(declared)
    if command.spreads:
        launch_arguments(declared)
    yield f"## dsv2 {name}"
    yield f"    dsv2 {name} {command.usage}"
    yield f"{command.help[0].upper()}{command.help[1:]}."
    yield "\n".join(argument(names, stated) for names, stated in declared.arguments)


def argument(names: tuple[str, ...], stated: Mapping[str, Any]) -> str:
    """A list item for an argument."""
    shown = stated.get("metavar")
    shown = " ".join(shown) if isinstance(shown, tuple) else shown
    if not names[0].startswith("-"):
        return f"- `{shown or names[0]}`: {prose(stated['help'])}"
    takes = (
        "" if stated.get("action") == "store_true" else f" {shown or '|'.join(stated.get('choices', ())) or 'VALUE'}"
    )
    return f"- `{names[0]}{takes}`: {prose(stated['help'])}"


# --- the picture -------------------------------------------------------------------------------------------------


def chain_picture() -> str:
    """The demo's chain as an SVG file, in the colours of the report."""
    place = ROOT / "recipes" / "tiny"
    chain = read_mapping(place / "chain.yaml")
    kinds = {entry["name"]: stages()[read_mapping(place / entry["recipe"])["stage"]].title for entry in chain["stages"]}
    shown = {name: Shown(kind) for name, kind in {BASE: "base model", **kinds}.items()}
    drawing = str(draw_chain(chain_nodes(chain, titles_of(chain).stages), shown))
    size = 'xmlns="http://www.w3.org/2000/svg" width="640"'
    return drawing.replace("<svg ", f"<svg {size} ", 1).replace(">", f"><style>{STYLE}</style>", 1) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs")
    made = {"keys.md": keys_page(), "commands.md": commands_page(), "chain.svg": chain_picture()}
    for page, text in made.items():
        (folder / page).write_text(text, encoding="utf-8")
