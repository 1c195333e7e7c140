"""Reads the adapter_config.json of an adapter in PEFT's layout, and checks it for values with which PEFT would fail.

Its patterns are matched against the name of every module, so none may take forever. Python's regular expressions
backtrack: the time of `(.*)+x` doubles with each letter of a name, each further `.*` multiplies it by the length, and
alternatives multiply it too. Real configs name layers and projections, which is cheap.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..configuration import check_settings_finite
from ..errors import ModelError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_RANK = 100_000  # larger than any dimension of a weight

LONGEST = 1000  # characters per pattern
MOST_STEPS = 1_000_000  # matching steps per name, some hundredths of a second
MOST = 10_000  # patterns per field
_NAME_LENGTH = 50  # characters of a module's name that one repeat may match

_DIGITS = re.compile(r"(?:\\d|\[0-9\])[*+]")  # a name has few
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP = re.compile(r"\([^()]*\)")
_REPEAT = re.compile(r"[*+{]|(?<![*+?}(])\?")
_FIELDS = (
    "target_modules", "exclude_modules", "layers_pattern", "target_parameters", "modules_to_save", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter."""
    return (Path(directory) / CONFIG).is_file()


def read_adapter_config(directory: str | Path) -> dict:
    """The contents of adapter_config.json. Raises ModelError if it cannot be used, or if the weights are missing."""
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


def check_ranks(config: Mapping[str, Any], source: str) -> None:
    """Raise ModelError for ranks and alphas, common or per target, with which PEFT would fail."""
    for field, per_target in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config.get(per_target)
        if not isinstance(patterns, Mapping | None):
            raise ModelError(
                f"{source}: {per_target} is {patterns!r}: it must be an object of patterns with their values"
            )
        values = {field: config[field]} if field in config else {}
        values |= {f"{per_target}.{pattern}": value for pattern, value in (patterns or {}).items()}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int if field == "r" else int | float):
                raise ModelError(f"{source}: {name} is {value!r}: it must be a number")
            if field == "r" and not 1 <= value <= LARGEST_RANK:
                raise ModelError(f"{source}: {name} is {value}: a rank is from 1 to {LARGEST_RANK:,}")


def check_patterns(config: Mapping[str, Any], source: str) -> None:
    """Reject patterns in an adapter's config that could take forever to match.

    Raises:
        ModelError: `pattern_fault` finds a fault, or there are too many patterns.
    """
    for field in _FIELDS:
        for pattern in _patterns(config.get(field), f"{source}: {field}"):
            if fault := pattern_fault(pattern):
                shown = pattern if len(pattern) <= 60 else f"{pattern[:57]}..."
                raise ModelError(f"{source}: {field}: {shown!r} {fault}")


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
    """An estimate of backtracking steps: name length to the power of repeats, times the alternatives of groups."""
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
