"""The report's tables of figures: results.json with intervals, gains between stages, manifests, all as plain cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

from recipes.report_data import Run
from recipes.report_metrics import number
from recipes.report_svg import short

Z95 = NormalDist().inv_cdf(0.975)
STAGE_NAMES = {
    "base": "Base, untrained",
    "sft": "SFT",
    "sft_control": "SFT control, as many seconds as RL 1",
    "rl_reasoning": "RL stage 1: reasoning",
    "rl_preference": "RL stage 2: preference",
}
# Shares of the headline, in order, with their heading; further keys of a stage follow under their own names.
SHARES = {
    "exact_match": "Exact match, greedy",
    "exact_match_t1": "Exact match, T = 1",
    "refusal_unsafe": "Unsafe refused, greedy",
    "refusal_unsafe_t1": "Unsafe refused, T = 1",
    "refusal_safe": "Safe refused, greedy",
    "refusal_safe_t1": "Safe refused, T = 1",
    "pair_accuracy": "Pairs ranked right",
}
# (label, later stage, earlier stage, sign): differences of exact match that the chain is about.
GAINS = (
    ("RL stage 1 over SFT", "rl_reasoning", "sft", 1),
    ("RL stage 1 over the control", "rl_reasoning", "sft_control", 1),
    ("Alignment tax: RL stage 1 less RL stage 2", "rl_preference", "rl_reasoning", -1),
)
NOT_STATED = "not stated"
OF_RESULTS = ("seed", "stages", "reward_models", "seconds", "peak_memory_gb", "targets")


@dataclass(frozen=True)
class Cell:
    """What stands in a table; `minor` in smaller type below; `bar` is a share with its interval, drawn;
    `tone` is good, bad or nothing."""

    text: str
    minor: str = ""
    tone: str = ""
    bar: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Table:
    """The first cell of each row is its heading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share out of n (Wilson 1927), inside [0, 1] also at 0 % and 100 %."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def sample_size(entry: dict[str, Any], key: str) -> float | None:
    """How many prompts stand behind `key`: an n of its own, or the common `n` where it can only mean that."""
    plain = key.removesuffix("_t1")
    names = [f"n_{plain}", f"{plain}_n", f"n_{plain.removeprefix('refusal_')}"]
    names += ["n"] if plain in ("exact_match", "pair_accuracy") or plain.startswith("wrong_answer") else []
    found = [n for name in names if (n := number(entry.get(name))) is not None and 0 < n < math.inf]
    return found[0] if found else None


def share_cell(entry: dict[str, Any], key: str) -> Cell:
    """A share in per cent with its interval and n. What is no share is shown as it is, marked."""
    share = number(entry.get(key))
    if share is None:
        return Cell("–") if entry.get(key) is None else Cell(str(entry[key]), "not a number", "bad")
    if not 0 <= share <= 1:
        return Cell(short(share) if math.isfinite(share) else str(share), "not a share of 1", "bad")
    n = sample_size(entry, key)
    if n is None:
        return Cell(f"{share:.1%}", "n not stated", bar=(share, share, share))
    low, high = wilson(share, n)
    return Cell(f"{share:.1%}", f"{100 * low:.1f} to {100 * high:.1f}, n = {n:,.0f}", bar=(low, share, high))


def stage_name(name: str) -> str:
    return STAGE_NAMES.get(name, name)


def entries(results: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    """The well-formed entries of `stages` or `reward_models`."""
    found = results.get(section)
    return {str(k): v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def shares_table(title: str, found: dict[str, dict[str, Any]], names: dict[str, str]) -> Table | None:
    """Rows are entries, columns the SHARES that any of them has, then whatever else they hold but sample sizes."""
    keys = dict.fromkeys(key for entry in found.values() for key in entry)
    known = [key for key in SHARES if key in keys]
    sizes = {name for name in keys if name == "n" or name.startswith("n_") or name.endswith("_n")}
    other = [key for key in keys if key not in known and key not in sizes]
    if not known and not other:
        return None
    rows = [
        [
            Cell(names.get(name, name)),
            *(share_cell(entry, key) for key in known),
            *(plain_cell(entry.get(key)) for key in other),
        ]
        for name, entry in found.items()
    ]
    columns = [*(SHARES[key] for key in known), *other]
    return Table(title, ["", *columns], rows, "Below each share: 95 % interval (Wilson), per cent.")


def gains(results: dict[str, Any]) -> Table | None:
    """Differences of exact match in points. The interval takes the two samples as independent, which is too wide
    where the prompts are the same."""
    stages = entries(results, "stages")
    rows = []
    for label, later, earlier, sign in GAINS:
        if later in stages and earlier in stages:
            cells = [
                _difference(stages[later], stages[earlier], key, sign) for key in ("exact_match", "exact_match_t1")
            ]
            if any(cell.text != "–" for cell in cells):
                rows.append([Cell(label), *cells])
    if not rows:
        return None
    note = "Points of exact match; 95 % interval of two independent samples, too wide where prompts are the same."
    return Table("Gains and tax", ["", "Greedy", "T = 1"], rows, note)


def targets(results: dict[str, Any]) -> Table | None:
    """The `targets` of results.json: a list, or a mapping by name, of {target, value, met}; a bare bool is `met`."""
    stated = results.get("targets")
    if isinstance(stated, dict):
        stated = [{"name": k, **(v if isinstance(v, dict) else {"met": v})} for k, v in stated.items()]
    if not isinstance(stated, list):
        return None
    rows = []
    for item in stated:
        found = item if isinstance(item, dict) else {"name": str(item)}
        met = found.get("met")
        verdict = Cell("met", tone="good") if met is True else Cell("not met", tone="bad")
        verdict = verdict if isinstance(met, bool) else Cell(NOT_STATED)
        cells = [plain_cell(found.get("target")), plain_cell(found.get("value")), verdict]
        rows.append([Cell(str(found.get("name", "–"))), *cells])
    return Table("Targets", ["", "Target", "Reached", ""], rows) if rows else None


def other_results(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything in results.json that no table above shows."""
    return flatten({key: value for key, value in results.items() if key not in OF_RESULTS})


def across(chains: Sequence[Run]) -> Table | None:
    """Mean and range of every share over several chains (seeds)."""
    if len(chains) < 2:
        return None
    by_stage = [entries(chain.results, "stages") for chain in chains]
    names = dict.fromkeys(name for stages in by_stage for name in stages)
    keys = [key for key in SHARES if any(key in entry for stages in by_stage for entry in stages.values())]
    rows = [
        [Cell(stage_name(name)), *(_spread([stages.get(name, {}).get(key) for stages in by_stage]) for key in keys)]
        for name in names
    ]
    seeds = ", ".join(str(chain.results.get("seed", "not stated")) for chain in chains)
    return Table("All chains", ["", *(SHARES[key] for key in keys)], rows, f"Mean and range; seeds: {seeds}.")


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Seed, seconds and memory of a chain, as words."""
    pairs = [("Seed", plain(results.get("seed")))]
    seconds = results.get("seconds")
    if isinstance(seconds, dict):
        pairs += [(f"Time, {name}", duration(value)) for name, value in seconds.items()]
    else:
        pairs.append(("Time", duration(seconds)))
    return [*pairs, ("Peak memory", _gigabytes(results.get("peak_memory_gb")))]


def brief(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts of a manifest that a reader wants first; one that is not stated is left out."""
    code = manifest.get("code") if isinstance(manifest.get("code"), dict) else {}
    versions = manifest.get("versions")
    stated = {
        "Status": manifest.get("status"),
        "Started": manifest.get("started"),
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


def plain_cell(value: Any) -> Cell:
    if isinstance(value, dict | list):
        return Cell("; ".join(f"{key} {text}".strip() for key, text in flatten(value)))
    return Cell("–" if value is None else plain(value))


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


def _difference(later: dict[str, Any], earlier: dict[str, Any], key: str, sign: int) -> Cell:
    a, b = number(later.get(key)), number(earlier.get(key))
    if a is None or b is None:
        return Cell("–")
    points = 100 * sign * (a - b)
    n_a, n_b = sample_size(later, key), sample_size(earlier, key)
    if not n_a or not n_b or not (0 <= a <= 1 and 0 <= b <= 1):
        return Cell(f"{points:+.1f}", "n not stated")
    half = 100 * Z95 * math.sqrt(a * (1 - a) / n_a + b * (1 - b) / n_b)
    return Cell(f"{points:+.1f}", f"{points - half:+.1f} to {points + half:+.1f}")


def _spread(values: Sequence[Any]) -> Cell:
    found = [v for value in values if (v := number(value)) is not None and math.isfinite(v)]
    if not found:
        return Cell("–")
    return Cell(f"{fmean(found):.1%}", f"{100 * min(found):.1f} to {100 * max(found):.1f}, {len(found)} chains")
