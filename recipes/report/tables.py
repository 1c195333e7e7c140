"""The report's tables of figures: results.json with intervals, gains between stages, manifests, all as plain cells."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

from recipes.report.charts import short
from recipes.report.metrics import number
from recipes.report.run_files import Run
from recipes.report.words import NOT_STATED, flatten, plain
from recipes.runs.results import TRUNCATED

Z95 = NormalDist().inv_cdf(0.975)
STAGE_NAMES = {
    "base": "Base",
    "sft": "SFT",
    "sft_control": "SFT control",
    "rl_reasoning": "RL stage 1: reasoning",
    "rl_preference": "RL stage 2: preference",
}
COMPARISONS = {
    "rl_gain": "RL stage 1 over SFT",
    "rl_gain_over_control": "RL stage 1 over the control",
    "alignment_tax": "Alignment tax of RL stage 2",
}
CONTROL = "The control goes on with SFT for as many tokens as RL stage 1 trains on."
# Shares of the headline, in order, with their heading; further keys of a stage follow under their own names.
SHARES = {
    "exact_match": "Exact match, greedy",
    "exact_match_t1": "Exact match, T = 1",
    "polite": "Polite, greedy",
    "polite_t1": "Polite, T = 1",
    "refusal_unsafe": "Unsafe refused, greedy",
    "refusal_unsafe_t1": "Unsafe refused, T = 1",
    "refusal_safe": "Safe refused, greedy",
    "refusal_safe_t1": "Safe refused, T = 1",
    "pair_accuracy": "Pairs ranked right",
    "wrong_of_sft": "Wrong answers of SFT ranked lower",
    "wrong_of_rl": "Wrong answers of RL stage 1 ranked lower",
    "wrong_answer": "Slips ranked lower",
}
# (later stage, earlier stage): differences of exact match to show where results.json has no paired comparison.
GAINS = (("rl_reasoning", "sft"), ("rl_reasoning", "sft_control"), ("rl_preference", "rl_reasoning"))
SAMPLED = re.compile(r"_t[0-9.]+$")
DECODINGS = {"greedy": "Greedy", "t1": "T = 1"}
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
    """How many prompts stand behind `key`: `TASK_n` or `n_TASK`; plain `n` is that of the first task."""
    task = SAMPLED.sub("", key.removesuffix(TRUNCATED))
    names = [f"{task}_n", f"n_{task}", f"n_{task.removeprefix('refusal_')}"]
    first = next((SAMPLED.sub("", known) for known in entry if not _is_size(known)), None)
    names += ["n"] if task == first else []
    found = [n for name in names if (n := number(entry.get(name))) is not None and 0 < n < math.inf]
    return found[0] if found else None


def _is_size(key: str) -> bool:
    return key == "n" or key.startswith("n_") or key.endswith("_n")


def share_cell(entry: dict[str, Any], key: str) -> Cell:
    """A share in per cent with its interval and n. What is no share is shown as it is, marked."""
    share = number(entry.get(key))
    if share is None:
        return Cell("–") if entry.get(key) is None else Cell(str(entry[key]), "not a number", "bad")
    if not 0 <= share <= 1:
        return Cell(short(share) if math.isfinite(share) else str(share), "not a share of 1", "bad")
    n = sample_size(entry, key)
    if n is None:
        return Cell(f"{100 * share:.1f} %", "n not stated", bar=(share, share, share))
    low, high = wilson(share, n)
    return Cell(f"{100 * share:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}, n = {n:,.0f}", bar=(low, share, high))


def stage_name(name: str) -> str:
    return STAGE_NAMES.get(name, name)


def entries(results: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    """The well-formed entries of `stages` or `reward_models`."""
    found = results.get(section)
    return {str(k): v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def shares_table(title: str, found: dict[str, dict[str, Any]], names: dict[str, str]) -> Table | None:
    """Rows are entries (those in `names` first, in its order); columns their shares, then what else they hold."""
    keys = [key for key in dict.fromkeys(key for entry in found.values() for key in entry) if not _is_size(key)]
    if not keys:
        return None
    cut = {key: any(entry.get(key) for entry in found.values()) for key in keys if key.endswith(TRUNCATED)}
    keys = [key for key in keys if cut.get(key, True)]
    shares = [key for key in SHARES if key in keys]
    shares += [key for key in keys if key not in SHARES and _is_share(key, found)]
    other = [key for key in keys if key not in shares]
    rows = [
        [
            Cell(names.get(name, name)),
            *(share_cell(found[name], key) for key in shares),
            *(plain_cell(found[name].get(key)) for key in other),
        ]
        for name in _in_order(found, names)
    ]
    columns = [_heading(key) for key in (*shares, *other)]
    notes = ["Below each share: its 95 % interval (Wilson) in per cent."] if shares else []
    notes += ["No answer was cut at max_new_tokens."] if cut and not any(cut.values()) else []
    notes += [CONTROL] if "sft_control" in found else []
    return Table(title, ["", *columns], rows, " ".join(notes))


def _heading(key: str) -> str:
    if key.endswith(TRUNCATED):
        return f"{_heading(key.removesuffix(TRUNCATED))}: cut at max_new_tokens"
    return SHARES.get(key, f"{key}, nats" if key.endswith("loss") else key)


def _in_order(found: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names found, the known ones first and in their order."""
    there = dict.fromkeys(found)
    return list(dict.fromkeys([*(name for name in known if name in there), *there]))


def _is_share(key: str, found: dict[str, dict[str, Any]]) -> bool:
    """Whether a figure of unknown name is a share: its n is known and it lies in [0, 1]. A loss is none."""
    values = [value for entry in found.values() if (value := number(entry.get(key))) is not None]
    sized = any(sample_size(entry, key) for entry in found.values() if key in entry)
    return sized and not key.endswith("loss") and all(0 <= value <= 1 for value in values)


def changes(results: dict[str, Any]) -> Table | None:
    """The paired comparisons of results.json, in points; where it has none, plain differences of exact match."""
    found = {name: value for name, value in results.items() if is_comparison(value)}
    if not found:
        return _unpaired(results)
    kinds = list(dict.fromkeys(str(kind) for value in found.values() for kind in value["change"]))
    rows = [
        [
            Cell(COMPARISONS.get(name, name), f"{_of_eval(value['before'])} → {_of_eval(value['after'])}"),
            *(_paired_cell(value["change"].get(kind)) for kind in kinds),
        ]
        for name, value in found.items()
    ]
    note = "Points of exact match, later less earlier, on the same prompts; below: 95 % interval of the paired mean."
    return Table("Changes, paired", ["", *(DECODINGS.get(kind, kind) for kind in kinds)], rows, note)


def is_comparison(value: Any) -> bool:
    """Whether an entry of results.json is a paired comparison of two evaluations."""
    return isinstance(value, dict) and {"before", "after"} <= set(value) and isinstance(value.get("change"), dict)


def _of_eval(name: Any) -> str:
    return stage_name(str(name).removeprefix("eval_"))


def _paired_cell(change: Any) -> Cell:
    found = change if isinstance(change, dict) else {}
    mean, error, n = (number(found.get(key)) for key in ("difference", "standard_error", "n"))
    if mean is None or error is None or n is None or not math.isfinite(mean + error):
        return Cell("–", "no prompts in common" if found else "")
    low, high = 100 * (mean - Z95 * error), 100 * (mean + Z95 * error)
    return Cell(_signed(100 * mean), f"{_signed(low)} to {_signed(high)}, n = {n:,.0f}")


def _unpaired(results: dict[str, Any]) -> Table | None:
    stages = entries(results, "stages")
    keys = ("exact_match", "exact_match_t1")
    rows = [
        [
            Cell(stage_name(later), f"less {stage_name(earlier)}"),
            *(_difference(stages[later], stages[earlier], key) for key in keys),
        ]
        for later, earlier in GAINS
        if later in stages and earlier in stages
    ]
    note = "Points of exact match; below: 95 % interval of two independent samples, too wide where prompts are shared."
    return Table("Changes, not paired", ["", "Greedy", "T = 1"], rows, note) if rows else None


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
    return flatten({key: value for key, value in results.items() if key not in OF_RESULTS and not is_comparison(value)})


def across(chains: Sequence[Run]) -> Table | None:
    """Mean and range of every share over several chains (seeds)."""
    if len(chains) < 2:
        return None
    by_stage = [entries(chain.results, "stages") for chain in chains]
    names = _in_order(dict.fromkeys(name for stages in by_stage for name in stages), STAGE_NAMES)
    keys = [key for key in SHARES if any(key in entry for stages in by_stage for entry in stages.values())]
    rows = [
        [Cell(stage_name(name)), *(_spread([stages.get(name, {}).get(key) for stages in by_stage]) for key in keys)]
        for name in names
    ]
    seeds = ", ".join(str(chain.results.get("seed", "not stated")) for chain in chains)
    return Table("All chains", ["", *(SHARES[key] for key in keys)], rows, f"Mean and range; seeds: {seeds}.")


def plain_cell(value: Any) -> Cell:
    if isinstance(value, dict | list):
        return Cell("; ".join(f"{key} {text}".strip() for key, text in flatten(value)))
    return Cell("–" if value is None else plain(value))


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "\u2212")


def _difference(later: dict[str, Any], earlier: dict[str, Any], key: str) -> Cell:
    a, b = number(later.get(key)), number(earlier.get(key))
    if a is None or b is None:
        return Cell("–")
    points = 100 * (a - b)
    n_a, n_b = sample_size(later, key), sample_size(earlier, key)
    if not n_a or not n_b or not (0 <= a <= 1 and 0 <= b <= 1):
        return Cell(_signed(points), "n not stated")
    half = 100 * Z95 * math.sqrt(a * (1 - a) / n_a + b * (1 - b) / n_b)
    return Cell(_signed(points), f"{_signed(points - half)} to {_signed(points + half)}")


def _spread(values: Sequence[Any]) -> Cell:
    found = [v for value in values if (v := number(value)) is not None and math.isfinite(v)]
    if not found:
        return Cell("–")
    return Cell(f"{100 * fmean(found):.1f} %", f"{100 * min(found):.1f} to {100 * max(found):.1f}, {len(found)} chains")
