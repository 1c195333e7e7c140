"""A rendered conversation as parts: text of the template, contents of messages, special tokens, and what is trained.

A template is rendered with Unicode noncharacters as placeholders. User text never passes through it, so none of it can
be mistaken for a placeholder.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

BOS, EOS, TRAINED_START, TRAINED_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_CONTENT_START, _CONTENT_END = "\ufdd4", "\ufdd5"
_MARKER = re.compile(f"([{BOS}{EOS}{TRAINED_START}{TRAINED_END}]|{_CONTENT_START}[0-9]+{_CONTENT_END})")


@dataclass(frozen=True)
class Part:
    """One piece of a rendered conversation, in order.

    kind: "text" (the template's own, in `text`), "content" (of message number `message`), or the special token "bos" or
    "eos". turn: the index of the assistant turn whose trained text includes this piece; None if it is not trained.
    """

    kind: Literal["text", "content", "bos", "eos"]
    turn: int | None
    text: str = ""
    message: int = -1


def placeholder(message: int) -> str:
    """Stands for the content of a message."""
    return f"{_CONTENT_START}{message}{_CONTENT_END}"


def split_rendered(rendered: str) -> Iterator[Part]:
    """The parts of a text with placeholders and marks."""
    turns = count()
    turn: int | None = None
    for piece in filter(None, _MARKER.split(rendered)):
        if piece == TRAINED_START:
            turn = next(turns)
        elif piece == TRAINED_END:
            turn = None
        elif piece == BOS:
            yield Part("bos", turn)
        elif piece == EOS:
            yield Part("eos", turn)
        elif piece.startswith(_CONTENT_START):
            yield Part("content", turn, message=int(piece[1:-1]))
        else:
            yield Part("text", turn, text=piece)
