"""Which strings name a model of the hub, and which a directory that is not there."""

import os
import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_OURS = re.compile(r"final|base|checkpoint-\d+|epoch[-_]\d+|step[-_]\d+")  # directories of runs, ours and others'
_LONGEST = 96  # the hub's own limit


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a string can be OWNER/NAME of the hub: nothing else is ever asked of it, with the user's token.

    A name without a slash, and what looks like a path on this machine (`./a`, `~/a`, `runs/final`, or a directory
    that is here by its first part), is none.
    """
    text = os.fspath(path)
    if len(text) > _LONGEST or not _NAME.fullmatch(text) or "--" in text or ".." in text:
        return False
    owner, _, name = text.partition("/")
    return not _OURS.fullmatch(name) and not Path(owner).is_dir() and not text.endswith((".git", ".ipynb"))
