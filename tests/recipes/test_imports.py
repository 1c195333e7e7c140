"""What must stay quick to import."""

import json
import subprocess
import sys

import pytest

import conversations

HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate"}
LIGHT_MODULES = [
    "conversations",
    "conversations.formats.table",
    "conversations.reading.load",
    "conversations.rendering.conversation",
    "conversations.sections",
    "conversations.rendering.template",
    "eval",
    "eval.config",
    "recipes",
    "recipes.cli",
    "reward",
    "reward.config",
    "rl",
    "rl.config",
    "sft",
    "sft.config",
]


def loaded_after(*steps: str) -> dict[str, set[str]]:
    """The heavy modules that a fresh interpreter has loaded after each step of code, one step after the other."""
    lines = [f"{step}\nloaded[{step!r}] = sorted(heavy & set(sys.modules))" for step in steps]
    code = "\n".join([f"import json, sys\nheavy, loaded = {HEAVY}, {{}}", *lines, "print(json.dumps(loaded))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {step: set(names) for step, names in json.loads(done.stdout.splitlines()[-1]).items()}


def test_light_modules_import_nothing_heavy():
    names = "from conversations import load_conversations, render_conversation"
    loaded = loaded_after(names, *(f"import {module}" for module in LIGHT_MODULES))
    assert {step: heavy for step, heavy in loaded.items() if heavy} == {}


def test_help_of_the_command_line_imports_nothing_heavy():
    help_ = "from recipes.cli import main\ntry: main(['--help'])\nexcept SystemExit as done: assert not done.code"
    assert loaded_after(help_) == {help_: set()}


def test_unknown_export_of_conversations_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'render'"):
        _ = conversations.render  # pyright: ignore
