"""From judged answers to the rows of pairs.jsonl, scored.jsonl and best.jsonl, and the figures. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import fmean
from typing import Any

from conversations.answers.prompts import prompt_of
from conversations.formats.bad_row import BadRow, read_text
from conversations.rewards.base import Reward
from conversations.rewards.rule import RuleReward
from conversations.row import Row
from pairs.choosing import Judged, LeftOut, Pair, balanced, best_of, distinct, pairs_of
from pairs.config import BEST, PAIRS, SCORED, PairsRecipe

DIGITS = 6  # of rewards: beyond these they may depend on the batch

OTHERS = ("truncated", "unjudged", "unreadable", "duplicates")  # answers that go to no file

Sample = Mapping[str, Any]


def verifiers_of(rewards: Sequence[Reward]) -> list[str]:
    """The names of the rules that decide whether an answer is right: those that need a reference, or else all."""
    rules = [reward for reward in rewards if isinstance(reward, RuleReward)]
    return [rule.name for rule in [rule for rule in rules if rule.needs_reference] or rules]


def is_readable(text: str) -> bool:
    """Whether a data file may hold the text: a model can also write NUL characters and halves of surrogate pairs."""
    try:
        read_text(text, "answer")
    except BadRow:
        return False
    return True


def total_of(values: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the rewards that have a value; None if none has."""
    found = [weights[name] * value for name, value in values.items() if value is not None]
    return round(sum(found), DIGITS) if found else None


@dataclass(frozen=True)
class Group:
    """The answers to one prompt.

    Args:
        answers: the distinct ones that were judged, not truncated, and can be read back; only these go to files. A
            truncated answer would get an end token that the model never produced.
        truncated, unjudged, unreadable, duplicates: how many others there are.
        right: of each answer that a verifier judged, whether it is right.
    """

    row: int
    answers: list[Judged]
    truncated: int
    unjudged: int
    unreadable: int
    duplicates: int
    right: list[bool]


def group_of(samples: Sequence[Sample], weights: Mapping[str, float], verifiers: Sequence[str]) -> Group:
    """The group of one prompt's samples. A reward applies to a prompt if it has a value for any of its answers; an
    answer without a value of each of those is not judged, since sums over different rewards cannot be compared."""
    applied = [name for name in weights if any(sample["rewards"][name] is not None for sample in samples)]
    judged: list[Judged] = []
    for sample in samples:
        verdicts = [sample["rewards"][name] for name in verifiers if name in applied]
        right = all(value == 1 for value in verdicts) if verdicts else None
        if applied and all(sample["rewards"][name] is not None for name in applied):
            judged.append(Judged(sample["row"], sample["answer"], sample["completion"], sample["reward"], right))
    truncated = {sample["answer"] for sample in samples if sample["truncated"]}
    whole = [each for each in judged if each.answer not in truncated]
    readable = [each for each in whole if is_readable(each.text)]
    answers = distinct(readable)
    return Group(
        row=samples[0]["row"],
        answers=answers,
        truncated=len(truncated),
        unjudged=len(samples) - len(truncated) - len(whole),
        unreadable=len(whole) - len(readable),
        duplicates=len(readable) - len(answers),
        right=[each.right for each in judged if each.right is not None],
    )


def preference_data(
    recipe: PairsRecipe,
    rows: Sequence[Row],
    samples: Sequence[Sample],
    weights: Mapping[str, float],
    verifiers: Sequence[str],
) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """The rows of each file, by its name, and what results.json says.

    Args:
        samples: the judged answers, sorted by row and answer.
        weights: of the rewards, by name.
        verifiers: the rewards that decide whether an answer is right.

    Returns:
        results: prompts, answers, and how many of these are in no file (truncated, unjudged, unreadable, duplicates);
        all_right and all_wrong prompts (None without verifiers) and usable ones, with a better and a worse answer;
        pairs, scored and best rows; left_out, pairs by reason; chosen_longer, the share of pairs whose chosen answer is
        the longer one, of those that differ in length; by_verifier, {n, mean} of each reward.
    """
    groups = [
        group_of(list(of_row), weights, verifiers) for _, of_row in groupby(samples, lambda sample: sample["row"])
    ]
    left_out = LeftOut()
    limits: dict[str, Any] = {
        "most": recipe.max_pairs_per_prompt,
        "min_margin": recipe.min_margin,
        "left_out": left_out,
    }
    pairs = [pair for group in groups for pair in pairs_of(group.answers, seed=f"{recipe.seed} {group.row}", **limits)]
    pairs = _without_duplicates(pairs, rows, left_out)
    pairs = balanced(pairs, left_out) if recipe.balance_lengths else pairs
    scored = [each for group in groups for each in group.answers]
    best = [each for group in groups if (each := best_of(group.answers)) and each.text]
    by_place = {(sample["row"], sample["answer"]): sample for sample in samples}
    made = {
        PAIRS: [_pair_row(recipe, pair, rows, by_place) for pair in pairs],
        SCORED: [_scored_row(recipe, each, rows, by_place) for each in scored],
        BEST: [_best_row(recipe, each, rows, by_place) for each in best],
    }
    unequal = [pair for pair in pairs if pair.longer]
    results = {
        "prompts": len(rows),
        "answers": len(samples),
        **{name: sum(getattr(group, name) for group in groups) for name in OTHERS},
        "all_right": sum(bool(group.right) and all(group.right) for group in groups) if verifiers else None,
        "all_wrong": sum(bool(group.right) and not any(group.right) for group in groups) if verifiers else None,
        "usable": sum(len({each.reward for each in group.answers}) > 1 for group in groups),
        "pairs": len(pairs),
        "scored": len(scored),
        "best": len(best),
        "left_out": asdict(left_out),
        "chosen_longer": sum(pair.longer > 0 for pair in unequal) / len(unequal) if unequal else None,
        "by_verifier": {name: _spread(samples, name) for name in weights},
    }
    return made, results


def _without_duplicates(pairs: Sequence[Pair], rows: Sequence[Row], left_out: LeftOut) -> list[Pair]:
    """A prompt may be in the data twice."""
    seen = {}
    for pair in pairs:
        prompt = tuple((turn["role"], turn["content"]) for turn in _prompt(rows, pair.chosen))
        seen.setdefault((prompt, pair.chosen.text, pair.rejected.text), pair)
    left_out.duplicates += len(pairs) - len(seen)
    return list(seen.values())


def _spread(samples: Sequence[Sample], name: str) -> dict[str, Any]:
    values = [value for sample in samples if (value := sample["rewards"][name]) is not None]
    return {"n": len(values), "mean": round(fmean(values), DIGITS) if values else None}


def _prompt(rows: Sequence[Row], judged: Judged) -> list[Row]:
    turns = prompt_of(rows[judged.row], judged.row + 1)
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _says(judged: Judged) -> list[Row]:
    return [{"role": "assistant", "content": judged.text}]


def _meta(recipe: PairsRecipe, answers: Sequence[Judged], verdicts: Any, rows: Sequence[Row]) -> dict[str, Any]:
    row = answers[0].row
    sampling = {
        "seed": recipe.seed,
        "temperature": recipe.temperature,
        "row": row,
        "answers": [each.answer for each in answers],
    }
    return {**(rows[row].get("meta") or {}), "verdicts": verdicts, "sampling": sampling}


def _verdicts(sample: Sample) -> dict[str, Any]:
    """{name of the reward: {score, reason}}"""
    return {
        name: {"score": value, **({"reason": sample["reasons"][name]} if name in sample["reasons"] else {})}
        for name, value in sample["rewards"].items()
    }


def _pair_row(recipe: PairsRecipe, pair: Pair, rows: Sequence[Row], samples: Mapping[Any, Sample]) -> Row:
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    verdicts = {side: _verdicts(samples[each.row, each.answer]) for side, each in sides.items()}
    return {
        "prompt": _prompt(rows, pair.chosen),
        "chosen": _says(pair.chosen),
        "rejected": _says(pair.rejected),
        "margin": round(pair.margin, DIGITS),
        "meta": _meta(recipe, list(sides.values()), verdicts, rows),
    }


def _scored_row(recipe: PairsRecipe, judged: Judged, rows: Sequence[Row], samples: Mapping[Any, Sample]) -> Row:
    meta = _meta(recipe, [judged], _verdicts(samples[judged.row, judged.answer]), rows)
    return {"prompt": _prompt(rows, judged), "completion": _says(judged), "score": judged.reward, "meta": meta}


def _best_row(recipe: PairsRecipe, judged: Judged, rows: Sequence[Row], samples: Mapping[Any, Sample]) -> Row:
    meta = _meta(recipe, [judged], _verdicts(samples[judged.row, judged.answer]), rows)
    return {"messages": [*_prompt(rows, judged), *_says(judged)], "meta": meta}
