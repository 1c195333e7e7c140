"""Single-line infilling from rows of HumanEval, for eval/tasks/humaneval_infilling_local.yaml. No torch."""

import random
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from eval.harness.scoring import of_verdicts
from eval.judging import Judged

SEED = 0  # of the holes: other lines are another benchmark


def with_hole(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `prefix`, `middle` and `suffix`: its prompt and solution around one line of the solution, which is
    drawn by a seed and the prompt among the lines that are more than a comment. The line's end is in the suffix."""
    lines = row["canonical_solution"].splitlines(keepends=True)
    usable = [place for place, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
    if not usable:
        raise ValueError(f"{row.get('task_id', row['entry_point'])}: canonical_solution has no line of code")
    place = random.Random(f"{SEED} {row['prompt']}").choice(usable)
    middle = lines[place].rstrip("\r\n")
    before = "".join([row["prompt"], *lines[:place]])
    after = "".join([lines[place][len(middle) :], *lines[place + 1 :]])
    return {**row, "prefix": before, "middle": middle, "suffix": after}


def with_holes(rows: Iterable[Mapping[str, Any]]) -> Any:
    """lm-eval's process_docs: the data set of `with_hole`."""
    from datasets import Dataset

    return Dataset.from_list([with_hole(row) for row in rows])


def of_lines(doc: Mapping[str, Any], results: Sequence[Sequence[Judged]]) -> dict[str, float]:
    """lm-eval's process_results: the mean score of a row's answers, and the share of those equal to the removed line,
    but for white space around it."""
    same = fmean(judged.text.strip() == doc["middle"].strip() for judged in results[0])
    return {**of_verdicts(doc, results), "exact_match": same}
