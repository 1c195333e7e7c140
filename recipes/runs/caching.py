"""The cache of prepared rows, and what every entry depends on besides the data and the recipe."""

import hashlib
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from conversations.row_cache import RowCache
from recipes.data.sources import CACHE
from recipes.processes import is_main, main_first
from recipes.stages import FOLDERS

# The code that reads, renders and encodes rows: our own packages above the model, and these libraries.
_PACKAGES = ("conversations", "recipes.data", *FOLDERS)
_LIBRARIES = ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers", "trl")


def row_cache(use_cache: bool) -> RowCache:
    """The cache of read or encoded rows in runs/prepared/; without `use_cache`, one that stores nothing."""
    if not use_cache:
        return RowCache(shows=is_main())
    return RowCache(CACHE / "prepared", _version(), main_first, is_main())


def _version() -> str:
    """A hash of the code and its libraries' versions."""
    digest = hashlib.sha256(platform.python_version().encode())
    for library in _LIBRARIES:
        digest.update(f"{library} {version(library)}\n".encode())
    for package in _PACKAGES:
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            for file in sorted(path for path in Path(folder).rglob("*") if path.suffix in (".py", ".jinja")):
                digest.update(f"{package}/{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
