"""Open-ended questions, correct answers to them, and the answers of a baseline, from files. No torch.

Two forms are read: MT-Bench's (FastChat: `question_id`, `category`, `turns`, `reference`; answers in `choices`) and
AlpacaEval's (`instruction`, `output`). A baseline may also be an evaluation of this toolkit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from conversations.errors import ToolkitError
from conversations.reading.records import raw_rows
from conversations.run_files import SAMPLES
from eval.open_ended.entry import OpenTask

Record = Mapping[str, Any]


class Said(NamedTuple):
    """An answer of the baseline. finished: whether it ended by itself, as far as known."""

    text: str
    finished: bool = True


@dataclass(frozen=True)
class Question:
    """A conversation to hold: what the user says, turn by turn.

    key: what answers in other files are found by. references: a correct answer to each turn, "" where there is none.
    opponent: the baseline's answers, if there is one.
    """

    place: str
    key: str
    turns: Sequence[str]
    category: str | None = None
    references: Sequence[str] = ()
    opponent: Sequence[Said] = ()

    def reference(self, turn: int) -> str | None:
        """A correct answer to a turn, after those to the turns before it."""
        given = self.references[: turn + 1]
        if len(given) <= turn or not given[turn]:
            return None
        return given[0] if turn == 0 else "\n\n".join(f"Turn {n}: {text}" for n, text in enumerate(given, 1))


def read_questions(task: OpenTask) -> list[Question]:
    """The questions of a task, with references and the baseline's answers.

    Raises:
        ToolkitError: a missing file, a row of another form, no row, or a baseline that lacks an answer.
    """
    rows = islice(raw_rows(task.path), task.limit)
    questions = [_question(place, row) for place, row in rows]
    if not questions:
        raise ToolkitError(f"{task.path}: no rows: the file is empty")
    if task.references is not None:
        known = _answers(raw_rows(task.references))
        if not any(question.key in known for question in questions):
            raise ToolkitError(f"{task.references}: has an answer to none of the questions; its question_id are others")
        questions = [_with(question, references=known.get(question.key, question.references)) for question in questions]
    if task.baseline is None:
        return questions
    answers = _baseline(Path(task.baseline), task.name)
    return [_with(question, opponent=_opponent(question, answers, task.baseline)) for question in questions]


def _with(question: Question, **changes: Any) -> Question:
    return Question(**{**question.__dict__, **changes})


def _question(place: str, row: Record) -> Question:
    turns = row["turns"] if "turns" in row else [row["instruction"]] if "instruction" in row else None
    if turns is None:
        raise ToolkitError(f"{place}: has neither `turns` nor `instruction` (it has {', '.join(row)})")
    if not _are_texts(turns) or not turns or not all(turn.strip() for turn in turns):
        raise ToolkitError(f"{place}: `turns` must be a list of one or more texts, none of them empty")
    references = row.get("reference") or []
    references = [references] if isinstance(references, str) else references
    if not _are_texts(references):
        raise ToolkitError(f"{place}: `reference` must be a text, or a list with one for each turn")
    category = row.get("category")
    return Question(place, _key(row, turns), turns, None if category is None else str(category), references)


def _key(row: Record, turns: Sequence[str]) -> str:
    """The row's question_id; questions without one are known by what is asked."""
    return f"question_id {row['question_id']}" if "question_id" in row else "\n\n".join(turns)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _answers(rows: Iterable[tuple[str, Record]]) -> dict[str, Sequence[str]]:
    """{key of a question: the answer to each of its turns}."""
    found: dict[str, Sequence[str]] = {}
    for place, row in rows:
        if "choices" in row and "question_id" in row:
            first = next(iter(row["choices"]), None) if isinstance(row["choices"], list) else None
            turns, key = first.get("turns") if isinstance(first, dict) else None, _key(row, ())
        elif "instruction" in row and "output" in row:
            turns, key = [row["output"]], str(row["instruction"])
        else:
            raise ToolkitError(
                f"{place}: is no answer: it has neither `question_id` and `choices` nor `instruction` and `output` "
                f"(it has {', '.join(row)})"
            )
        if not _are_texts(turns) or not turns:
            raise ToolkitError(f"{place}: the answers to its turns must be texts")
        found[key] = turns
    return found


def _baseline(path: Path, name: str) -> dict[str, Sequence[Said]]:
    if not path.is_dir():
        return {key: [Said(text) for text in turns] for key, turns in _answers(raw_rows(path)).items()}
    samples = path / SAMPLES
    if not samples.is_file():
        raise ToolkitError(f"baseline {path} is not an evaluation: it has no {SAMPLES}; run that evaluation first")
    found = _of_samples(raw_rows(samples), name)
    if not found:
        raise ToolkitError(f"baseline {path} has no answers to an open-ended task called {name}")
    return found


def _of_samples(rows: Iterator[tuple[str, Record]], name: str) -> dict[str, Sequence[Said]]:
    found: dict[str, list[Said]] = {}
    for _, row in rows:
        if row.get("task") == name and {"question", "turn", "completion"} <= row.keys():
            said = Said(str(row["completion"]), not row.get("truncated"))
            found.setdefault(str(row["question"]), []).append(said)
    return dict(found)


def _opponent(question: Question, answers: Mapping[str, Sequence[Said]], baseline: str) -> Sequence[Said]:
    given = answers.get(question.key, ())
    if len(given) < len(question.turns):
        raise ToolkitError(
            f"baseline {baseline} has {len(given)} of the {len(question.turns)} answers to {question.place}"
        )
    return given
