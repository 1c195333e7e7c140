"""Records of any known format -> conversations -> token ids and loss mask.

The names are loaded when they are first used: ``import conversations`` imports neither torch nor
transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conversations.answers.rules import verify
    from conversations.reading.load import load_conversations
    from conversations.rendering.conversation import render_conversation

__all__ = ["load_conversations", "render_conversation", "verify"]

_HOME = {
    "load_conversations": "conversations.reading.load",
    "render_conversation": "conversations.rendering.conversation",
    "verify": "conversations.answers.rules",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
