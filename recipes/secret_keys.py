"""Keeps secrets out of recipes, which are copied into run directories, manifests, checkpoints and reports."""

import re
from collections.abc import Iterator
from typing import Any

from conversations.errors import ToolkitError

# Fields about text tokens, whose names end like those of secrets.
_TEXT_TOKENS = {f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "image")}
_SECRET = r"(?:token|secret|password|passwd|passphrase|credentials?|(?:api|access|private|secret|auth)_?key)"
_SECRET_NAME = re.compile(rf"(?:.*[_-])?{_SECRET}", re.IGNORECASE)
_UPLOAD_NAME = re.compile(r"(?:push_to_hub|hub|trackio)(?:_.*)?|log_completions_hub_repo")
# Access tokens of the model hub and of the largest services.
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[A-Za-z0-9_-]{16,}")
_WRITTEN = re.compile(rf"(?<![\w.-])([\w.-]*(?<![A-Za-z]){_SECRET}(?:=|['\"]\s*:\s*))[^\s,}}]+", re.IGNORECASE)
# User and password in a URL (also if path handling removed its second slash), and secrets in its query.
_ADDRESS = re.compile(
    rf"(?<=:/)/?[^\s/?#@]+(?=@)|(?<=[?&])(?:[\w.-]*{_SECRET}|key|sig(?:nature)?|auth|x-amz-[\w-]+)=[^\s&#'\"]+",
    re.IGNORECASE,
)
_NAMED_FREELY = {"columns", "roles"}  # sections whose keys are the user's own words


def refuse_secrets(tree: Any, prefix: str = "") -> None:
    """Refuse keys that hold secrets or upload a run, and values that look like secrets; values are never shown.

    Raises:
        ToolkitError: naming the key.
    """
    for path, key, value in _entries(tree, prefix):
        if _UPLOAD_NAME.fullmatch(key):
            raise ToolkitError(
                f"{path}: a run is written to output_dir and uploaded nowhere; leave it out, set HF_TOKEN in the "
                "environment, and upload what you want with: hf upload"
            )
        is_secret_name = _SECRET_NAME.fullmatch(key) and key not in _TEXT_TOKENS and value is not None
        if is_secret_name or (isinstance(value, str) and (_SECRET_VALUE.search(value) or _ADDRESS.search(value))):
            raise ToolkitError(
                f"{path}: a secret must not be in a recipe, which is copied into the run directory; leave it out and "
                "set HF_TOKEN in the environment (or the variable of the service that it is for)"
            )


def without_secrets(text: str) -> str:
    """The text with anything that looks like a secret removed, for messages and manifests."""
    return _SECRET_VALUE.sub("***", _WRITTEN.sub(r"\1***", _ADDRESS.sub("***", text)))


def _entries(tree: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of every key and every list entry, at any depth."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        path = f"{prefix}{key}"
        free = prefix.rstrip(".").rpartition(".")[2] in _NAMED_FREELY
        yield path, "" if free else str(key), value
        yield from _entries(value, f"{path}.")
