"""JSON values of a run in words: numbers, durations, the facts of a manifest."""

from __future__ import annotations

import math
from typing import Any

from recipes.report.charts import short
from recipes.report.metrics import number

NOT_STATED = "not stated"


def brief(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts of a manifest that a reader wants first; one that is not stated is left out."""
    code = manifest.get("code") if isinstance(manifest.get("code"), dict) else {}
    versions = manifest.get("versions")
    stated = {
        "Status": manifest.get("status"),
        "Started": str(manifest.get("started", "")).replace("T", " ").replace("+00:00", " UTC"),
        "Time": _known(duration(manifest.get("seconds"))),
        "of it training": _known(duration(manifest.get("training_seconds"))),
        "Peak memory": _known(_gigabytes(manifest.get("peak_memory_gb"))),
        "Seed": manifest.get("seed"),
        "Commit": _commit(code or manifest),
        "Versions": _versions(versions) if isinstance(versions, dict) else None,
    }
    return [(key, str(value)) for key, value in stated.items() if value not in (None, "")]


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, text) pairs; lists of plain values stay together."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in flatten(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [pair for index, item in enumerate(value) for pair in flatten(item, f"{path}.{index}")]
    if isinstance(value, list):
        return [(path, ", ".join(plain(item) for item in value) or "none")]
    return [(path, plain(value))]


def plain(value: Any) -> str:
    """One JSON value in words."""
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


def _known(words: str) -> str | None:
    return None if words == NOT_STATED else words


def _commit(code: dict[str, Any]) -> str | None:
    commit = code.get("commit")
    if not isinstance(commit, str):
        return None
    changed = ", with local changes" if code.get("diff_sha256") or code.get("diff") else ""
    return commit[:12] + changed


def _versions(versions: dict[str, Any]) -> str:
    shown = [name for name in ("python", "torch", "transformers", "trl", "peft") if versions.get(name)]
    return ", ".join(f"{name} {versions[name]}" for name in shown)


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Seed, seconds and memory of a chain, as words."""
    pairs = [("Seed", plain(results.get("seed")))]
    seconds = results.get("seconds")
    if isinstance(seconds, dict):
        pairs += [(f"Time, {name}", duration(value)) for name, value in seconds.items()]
    else:
        pairs.append(("Time", duration(seconds)))
    return [*pairs, ("Peak memory", _gigabytes(results.get("peak_memory_gb")))]
