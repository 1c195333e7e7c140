"""Values as text: numbers, counts, durations, nested JSON, and the facts of a manifest."""

from __future__ import annotations

import math
from typing import Any

NOT_STATED = "not stated"
_TRAINERS = ("python", "torch", "transformers", "trl", "peft")  # versions shown first


def number(value: Any) -> float | None:
    """`value` as a float (including NaN and infinity), or None if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def short(value: float) -> str:
    """A compact form with at most four significant digits: 1.234, 12.5k, 3e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}"


def count(n: int, noun: str) -> str:
    """`3 lines`, `1 line`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def brief(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The most important facts of a manifest, as far as it has them."""
    code, versions = (stated if isinstance(stated := manifest.get(key), dict) else {} for key in ("code", "versions"))
    stated = {
        "Status": manifest.get("status"),
        "Started": str(manifest.get("started", "")).replace("T", " ").replace("+00:00", " UTC"),
        "Time": duration(manifest.get("seconds")),
        "Training time": duration(manifest.get("training_seconds")),
        "Peak memory": _gigabytes(manifest.get("peak_memory_gb")),
        "Seed": manifest.get("seed"),
        "Commit": _commit(code or manifest),
        "Versions": ", ".join(f"{name} {versions[name]}" for name in _TRAINERS if versions.get(name)),
    }
    return [(key, str(value)) for key, value in stated.items() if value not in (None, "", NOT_STATED)]


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, text) pairs; lists of scalars are kept as one value."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in flatten(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [pair for index, item in enumerate(value) for pair in flatten(item, f"{path}.{index}")]
    if isinstance(value, list):
        return [(path, ", ".join(plain(item) for item in value) or "none")]
    return [(path, plain(value))]


def plain(value: Any) -> str:
    """One JSON value as text."""
    if value is None:
        return NOT_STATED
    if isinstance(value, bool):
        return "yes" if value else "no"
    as_number = number(value)
    if isinstance(value, float) and as_number is not None and math.isfinite(as_number):
        return short(as_number)
    return str(value)


def duration(value: Any) -> str:
    seconds = number(value)
    if seconds is None or not math.isfinite(seconds):
        return NOT_STATED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _gigabytes(value: Any) -> str:
    gigabytes = number(value)
    return NOT_STATED if gigabytes is None else f"{gigabytes:.2f} GB"


def _commit(code: dict[str, Any]) -> str | None:
    commit = code.get("commit")
    if not isinstance(commit, str):
        return None
    changed = ", with local changes" if code.get("diff_sha256") or code.get("diff") else ""
    return commit[:12] + changed


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Seed, duration and memory of a chain, as text."""
    pairs = [("Seed", plain(results.get("seed")))]
    seconds = results.get("seconds")
    if isinstance(seconds, dict):
        pairs += [(f"Time, {name}", duration(value)) for name, value in seconds.items()]
    else:
        pairs.append(("Time", duration(seconds)))
    return [*pairs, ("Peak memory", _gigabytes(results.get("peak_memory_gb")))]
