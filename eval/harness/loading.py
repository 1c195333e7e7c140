"""From a recipe's entry to lm-eval's tasks: this toolkit's task files on local rows, other files in lm-eval's format,
and its registry. lm_eval is imported when a task is built, not before."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from conversations.answers.rules import check_reference
from conversations.errors import ToolkitError
from conversations.reading.records import raw_rows
from conversations.rendering.fill_in_the_middle import fim_ids
from conversations.sandbox import box
from conversations.tally import counted
from eval.config import BenchmarkTask

TASKS = Path(__file__).resolve().parents[1] / "tasks"
_FEWSHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True)
class Built:
    """The lm-eval tasks of a recipe's entry, by name; several for a group of its registry, or by subject.

    notes: what the user should know, such as fewer examples than the task has.
    """

    entry: BenchmarkTask
    tasks: Mapping[str, Any]
    notes: Sequence[str] = ()
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of each task's rows in its file


def own_tasks() -> dict[str, Path]:
    """The task files of this toolkit, by name."""
    return {path.stem: path for path in sorted(TASKS.glob("*.yaml"))}


def build(entry: BenchmarkTask, chat: bool) -> Built:
    """The tasks of an entry, with their rows.

    chat: whether prompts will be rendered by the chat template.

    Raises:
        ToolkitError: an unknown task, a missing file or column, or a data set of a hub that cannot be reached.
    """
    path = own_tasks().get(entry.task) or (Path(entry.task) if entry.task.endswith(".yaml") else None)
    try:
        built = _from_file(entry, path, chat) if path else _from_registry(entry)
    except ToolkitError as error:
        raise ToolkitError(f"task {entry.name}: {error}") from None
    for task in built.tasks.values():
        task.set_config(key="repeats", value=entry.num_answers)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return built


def check_tokens(built: Built, tokenizer: Any) -> None:
    """Raise ToolkitError for a fill-in-the-middle task and a tokenizer without its tokens."""
    if any((task.config.metadata or {}).get("fim") for task in built.tasks.values()):
        fim_ids(tokenizer, f"task {built.entry.name}")


# --- task files


def _from_file(entry: BenchmarkTask, path: Path, chat: bool) -> Built:
    config = _config(path)
    metadata = config.get("metadata") or {}
    columns = metadata.get("columns", [])
    if entry.path is None:
        needed = f"a file whose rows have {', '.join(columns)}" if columns else "a file of rows"
        raise ToolkitError(f"{path.stem} reads local rows: give it path, {needed}")
    if metadata.get("sandbox") and (why := box.why_unavailable()):
        raise ToolkitError(f"it runs the model's code in a sandbox, which is not available on this machine: {why}")
    if chat and metadata.get("fim"):
        raise ToolkitError("fill-in-the-middle has no form in a conversation: set chat_template: false")
    if chat and "chat_until" in metadata:
        config["generation_kwargs"]["until"] = metadata["chat_until"]
    rows = _rows(entry.path, columns, entry.limit)
    if rule := metadata.get("rule"):
        _check_references(rule, rows)
    placed = _rows(entry.fewshot_path, columns) if entry.fewshot_path else []
    _check_lists(metadata.get("lists", {}), [*rows, *placed])
    examples = [row for _, row in placed]
    shots, notes = _shots(entry, config, examples)
    parts = _by_subject(rows, metadata.get("by"))
    tasks = {
        name: _task(
            {**config, "num_fewshot": shots},
            name,
            [row for _, row in part],
            _of_subject(examples, metadata.get("by"), part, shots),
        )
        for name, part in (
            (f"{entry.name}_{subject}" if subject else entry.name, part) for subject, part in parts.items()
        )
    }
    places = {name: [place for place, _ in part] for name, part in zip(tasks, parts.values(), strict=True)}
    for name, task in tasks.items():
        _check_choices(task, places[name])
    return Built(entry, tasks, notes, places)


def _config(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return deepcopy(load_yaml(path))
    except FileNotFoundError:
        raise ToolkitError(f"no such task file: {path}") from None
    except Exception as error:  # whatever a user's YAML and functions raise
        raise ToolkitError(f"{path}: not a task file of lm-eval: {one_line(error)}") from error


def _rows(path: str, columns: Sequence[str], limit: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of each row of a file, of which the first `limit` are used."""
    rows = []
    for place, row in raw_rows(path):
        if lacking := [column for column in columns if column not in row]:
            near = get_close_matches(lacking[0], list(row), 1)
            guess = f"; is it {near[0]!r}?" if near else ""
            raise ToolkitError(f"{place}: has no {lacking[0]!r} (it has {', '.join(row)}){guess}")
        rows.append((place, row))
        if len(rows) == limit:
            break
    if not rows:
        raise ToolkitError(f"{path}: no rows: the file is empty")
    return rows


def _check_references(rule: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Raise ToolkitError for the first row that the rule of a task cannot read, before an answer is written for it."""
    for place, row in rows:
        try:
            check_reference(rule, row)
        except ToolkitError as error:
            raise ToolkitError(f"{place}: {error}") from None


def _check_lists(lists: Mapping[str, int | None], rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Raise ToolkitError for the first row without a list in these columns, of as many items if a number is given. Of a
    text, such as a CSV's, a task's template would take the letters."""
    for place, row in rows:
        for column, size in lists.items():
            value = row[column]
            if not isinstance(value, list) or not value or len(value) != (size or len(value)):
                raise ToolkitError(f"{place}: {column!r} must be a list{f' of {size}' if size else ''}, not {value!r}")


def _check_choices(task: Any, places: Sequence[str]) -> None:
    """Raise ToolkitError for the first row of multiple choice whose answer is none of its choices: lm-eval would count
    it as wrong whatever the model says."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for place, doc in zip(places, task.eval_docs, strict=True):
        target, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
        targets = target if isinstance(target, list) else [target]
        if any(one not in (range(len(choices)) if isinstance(one, int) else choices) for one in targets):
            raise ToolkitError(
                f"{place}: its answer {target!r} is none of the choices {', '.join(choices)}, and no number from 0 to "
                f"{len(choices) - 1}"
            )


def _shots(entry: BenchmarkTask, config: Mapping[str, Any], examples: Sequence[Any]) -> tuple[int, list[str]]:
    """(number of few-shot examples, a note if the task has more)."""
    usual = config.get("num_fewshot") or 0
    asked = usual if entry.num_fewshot is None else entry.num_fewshot
    samples = (config.get("fewshot_config") or {}).get("samples")
    own: Any = samples() if callable(samples) else samples
    if own and not examples and len(own) < asked:
        raise ToolkitError(
            f"num_fewshot is {asked}, and the task has {counted(len(own), 'example')}; give fewshot_path"
        )
    if not asked or examples or own:
        return asked, []
    if entry.num_fewshot is not None:
        raise ToolkitError("num_fewshot needs examples: give fewshot_path, a file with rows like those of path")
    return 0, [f"0 examples in the prompt, not {usual} as is usual: there is no fewshot_path"]


def _by_subject(rows: Sequence[tuple[str, Any]], key: str | None) -> dict[str, list[tuple[str, Any]]]:
    parts: dict[str, list[tuple[str, Any]]] = {}
    for place, row in rows:
        parts.setdefault(str(row.get(key) or "") if key else "", []).append((place, row))
    return parts


def _of_subject(examples: Sequence[Any], key: str | None, part: Sequence[tuple[str, Any]], shots: int) -> Sequence[Any]:
    """The examples for rows of a subject: those of the same one, or those that have none.

    Raises:
        ToolkitError: fewer than `shots`.
    """
    if not examples:
        return examples
    subject = part[0][1].get(key) if key else None
    same = [example for example in examples if not key or example.get(key) == subject]
    own = same or [example for example in examples if not example.get(key)]
    if len(own) < shots:
        of_it = f" of the {key} {subject!r}" if subject else ""
        raise ToolkitError(f"fewshot_path has {counted(len(own), 'example')}{of_it}, and num_fewshot is {shots}")
    return own


def _task(config: Mapping[str, Any], name: str, rows: Sequence[Any], examples: Sequence[Any]) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def dataset(**metadata: Any) -> dict[str, Any]:
        splits = {"test": rows, **({"fewshot": examples} if examples else {})}
        return {split: Dataset.from_list(list(listed)) for split, listed in splits.items()}

    split = {"fewshot_split": "fewshot"} if examples else {}
    try:
        return ConfigurableTask(config={**deepcopy(dict(config)), **split, "task": name, "custom_dataset": dataset})
    except Exception as error:  # a template on a row of another form, columns of several types, ...
        raise ToolkitError(f"its rows do not fit the task: {one_line(error)}") from error


# --- lm-eval's registry


@cache
def _registry() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _from_registry(entry: BenchmarkTask) -> Built:
    name = entry.task
    if name not in (known := _registry().all_tasks):
        near = get_close_matches(name, [*own_tasks(), *known], 1)
        hint = f"did you mean {near[0]!r}?" if near else "those that read local rows are " + ", ".join(own_tasks())
        raise ToolkitError(f"there is no task {name!r} here or in lm-eval's registry; {hint}")
    if entry.path or entry.fewshot_path:
        raise ToolkitError(
            f"{name} of lm-eval's registry has its own data; leave path and fewshot_path out{_local(name)}"
        )
    try:
        tasks = _registry().load([name])["tasks"]
    except Exception as error:  # from the hub, the network, or a package that the task's code needs
        raise ToolkitError(
            f"{name} of lm-eval's registry cannot be loaded, which needs the hub: {one_line(error)}{_local(name)}"
        ) from error
    if unsafe := next((task for task in tasks.values() if getattr(task, "UNSAFE_CODE", False)), None):
        raise ToolkitError(f"{unsafe.task_name} runs the model's code without a sandbox and is refused{_local(name)}")
    for task in tasks.values():
        if entry.num_answers > 1 and task.OUTPUT_TYPE == "generate_until":
            raise ToolkitError(f"num_answers: {name} reads one answer to a row{_local(name)}")
        shots = task.get_config("num_fewshot") if entry.num_fewshot is None else entry.num_fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
    return Built(entry, tasks)


def _local(name: str) -> str:
    """The task here that reads such rows from a file, as a remedy."""
    near = get_close_matches(f"{name}_local", list(own_tasks()), 1, 0.7)
    return f"; {near[0]} reads such rows from a file: give it path" if near else ""


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
