"""adapter_config.json of an adapter in PEFT's layout, read and held against what PEFT would fail over.

Its patterns are matched against the name of every module: none may take for ever. Python's regular expressions
backtrack: `(.*)+x` takes time that doubles with each letter of a name, each further `.*` another factor of its length,
and alternatives multiply. Real configs name layers and projections, which costs little.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..configuration import check_settings_finite
from ..errors import ModelError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_RANK = 100_000  # beyond any weight's size

LONGEST = 1000  # characters of a pattern
MOST_STEPS = 1_000_000  # of matching it against one name: some hundredths of a second
MOST = 10_000  # patterns in a field
_NAME_LENGTH = 50  # characters of a module's name that one repeat may take

_DIGITS = re.compile(r"(?:\\d|\[0-9\])[*+]")  # a name has few
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP = re.compile(r"\([^()]*\)")
_REPEAT = re.compile(r"[*+{]|(?<![*+?}(])\?")
_FIELDS = (
    "target_modules", "exclude_modules", "layers_pattern", "target_parameters", "modules_to_save", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip


def is_adapter(directory: str | Path) -> bool:
    return (Path(directory) / CONFIG).is_file()


def read_adapter_config(directory: str | Path) -> dict:
    """adapter_config.json. Raises ModelError when it, or the weights beside it, cannot be used."""
    path = Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable adapter config ({error})") from error
    try:
        check_settings_finite(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise ModelError(f"{path}: base_model_name_or_path is {config['base_model_name_or_path']!r}; it must be a name")
    check_patterns(config, str(path))
    check_ranks(config, str(path))
    if not (Path(directory) / WEIGHTS).is_file():
        raise ModelError(f"{directory}: no {WEIGHTS}; only safetensors adapters are read")
    return config


def check_ranks(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError for ranks and alphas, of all targets or of one, that PEFT would fail over."""
    for field, of_one in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config.get(of_one)
        if not isinstance(patterns, Mapping | None):
            raise ModelError(f"{where}: {of_one} is {patterns!r}: it must be an object of patterns with their values")
        values = {field: config[field]} if field in config else {}
        values |= {f"{of_one}.{pattern}": value for pattern, value in (patterns or {}).items()}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int if field == "r" else int | float):
                raise ModelError(f"{where}: {name} is {value!r}: it must be a number")
            if field == "r" and not 1 <= value <= LARGEST_RANK:
                raise ModelError(f"{where}: {name} is {value}: a rank is from 1 to {LARGEST_RANK:,}")


def check_patterns(config: Mapping[str, Any], where: str) -> None:
    """Refuse patterns of an adapter's config that could take for ever.

    Raises:
        ModelError: as `pattern_fault` says, or too many of them.
    """
    for field in _FIELDS:
        for pattern in _patterns(config.get(field), f"{where}: {field}"):
            if fault := pattern_fault(pattern):
                shown = pattern if len(pattern) <= 60 else f"{pattern[:57]}..."
                raise ModelError(f"{where}: {field}: {shown!r} {fault}")


def pattern_fault(pattern: str) -> str | None:
    """What is wrong with a pattern; None if it is cheap to match."""
    if len(pattern) > LONGEST:
        return f"has {len(pattern):,} characters; a pattern has at most {LONGEST:,}"
    bare = _ONE_CHARACTER.sub("c", _DIGITS.sub("d", pattern))
    if re.search(r"\)[*+{]", bare):
        return "repeats a group, which can take forever; write the repeat without a group"
    if _steps(bare) > MOST_STEPS:
        return f"can take over {MOST_STEPS:,} steps per name, the limit; use fewer repeats such as .*"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({error})"
    return None


def _steps(bare: str) -> int:
    """About how often a match may start again: letters to the power of repeats, times the alternatives of groups."""
    steps = _NAME_LENGTH ** len(_REPEAT.findall(bare))
    while group := _GROUP.search(bare):
        steps *= group[0].count("|") + 1
        bare = f"{bare[: group.start()]}g{bare[group.end() :]}"
    return steps * (bare.count("|") + 1)


def _patterns(value: Any, name: str) -> Iterator[str]:
    entries = [value] if isinstance(value, str) else list(value) if isinstance(value, list | Mapping) else []
    if len(entries) > MOST:
        raise ModelError(f"{name} has {len(entries):,} entries; at most {MOST:,} are read")
    yield from (pattern for pattern in entries if isinstance(pattern, str))
