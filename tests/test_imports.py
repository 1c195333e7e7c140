"""What must stay quick to import, and what must not need the trainers."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate"}
LIGHT_MODULES = [
    "conversations",
    "conversations.formats",
    "conversations.reading",
    "conversations.rendering",
    "conversations.sections",
    "conversations.template",
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


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    report = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_module_imports_nothing_heavy(module):
    assert not loaded_after(f"import {module}") & HEAVY


def test_help_of_the_command_line_imports_nothing_heavy():
    help_ = "from recipes.cli import main\ntry: main(['--help'])\nexcept SystemExit as done: assert not done.code"
    assert not loaded_after(help_) & HEAVY


def test_reading_and_exports_of_conversations_import_nothing_heavy():
    names = "from conversations import load_conversations, render_conversation"
    assert not loaded_after(names) & HEAVY


def test_unknown_export_of_conversations_is_an_attribute_error():
    import conversations

    with pytest.raises(AttributeError, match="no attribute 'render'"):
        _ = conversations.render  # pyright: ignore


def test_model_needs_neither_trl_nor_datasets():
    assert not loaded_after("import deepseek_v2_modeling") & {"trl", "datasets", "pydantic"}
