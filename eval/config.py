"""Recipe schema and stage definition of evaluation. Imports no torch.

`eval.stage.evaluate` returns one entry per task, by name: `{"n": rows, "greedy": value at temperature 0, "t1": value at
temperature 1}`, where a temperature T is named "t" + T. "greedy_interval" is the 95 % confidence interval of "greedy",
"greedy_truncated" the fraction of answers truncated at max_new_tokens, and "greedy_unread" that of answers in which a
rule that looks for an answer found none. pair_accuracy has "value" instead, and loss has "loss", in nats. reward has
"value", the accuracy, and named figures with intervals under "details", "by_source" and "by_kind" (eval/agreement.py).
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from conversations.answers.combining import Combine
from conversations.answers.prompts import prompt_of
from conversations.answers.text import compiled
from conversations.answers.usable_rows import (
    first_of,
    no_conversation,
    no_pair,
    no_question,
    no_reference,
    not_judged,
    unreadable_reference,
)
from conversations.environments.entry import EnvironmentSection
from conversations.rewards.entry import JudgeSettings, model_use
from conversations.row import Refuse
from conversations.run_files import RESULTS, SAMPLES
from conversations.sections import DataSource, Head, ModelSection, ModelUse, RowList, Section, StageRecipe
from conversations.stage import Shrink, Stage
from eval.benchmark import NEXT_TURN, BenchmarkTask, decoding_name
from eval.open_ended.entry import OPEN_ENDED, OpenTask

_RESERVED = re.compile(
    r"(^|_)(n|points|win_rate|truncated|unread|contaminated|version|interval|t\d+|details|by_source|by_kind)$"
)

_OF_ANSWERS = ("temperatures", "stop", "environment", "max_tool_calling_iterations")
# The answer settings that each metric uses.
_USED_BY = {
    "exact_match": ("rule", "settings", *_OF_ANSWERS),
    "refusal": ("patterns", *_OF_ANSWERS),
    "format": ("patterns", *_OF_ANSWERS),
    "judge": ("judge", *_OF_ANSWERS),
    "environment": _OF_ANSWERS,
    "pair_accuracy": ("combine",),
    "reward": ("combine",),
}

# Metrics that generate no answers, and the name of their value in the results.
UNSAMPLED_METRICS = {"pair_accuracy": "value", "reward": "value", "loss": "loss"}
SCORED = ("pair_accuracy", "reward")  # metrics that need a reward model


class EvalTask(Section):
    """One metric, measured on one list of rows."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Name of the task in the results.")
    metric: Literal["exact_match", "refusal", "format", "judge", "environment", "pair_accuracy", "reward", "loss"] = (
        Field(
            description="The fraction of correct answers, refusals, well-formed answers or correctly ranked pairs; the "
            "mean verdict of a judge, or of the environment itself; all figures of a reward model on pairs, labels, "
            "scores or right and wrong answers; or the mean loss."
        )
    )
    data: list[DataSource] = Field(
        default_factory=list, description="Rows of this task; the default is the recipe's `data`."
    )
    rule: str = Field(
        default="number", description="exact_match: the rule whose score is the value of an answer (docs/rules.md)."
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="exact_match: the rule's own settings.")
    judge: JudgeSettings | None = Field(
        default=None, description="judge: the language model that judges answers, as in the rewards of rl."
    )
    patterns: list[str] = Field(
        default_factory=list,
        description="Regular expressions. refusal: one is found in a sentence of the answer; the default is a built-in "
        "list. format: one matches the whole answer; by default any well-formed answer counts.",
    )
    temperatures: list[Annotated[float, Field(ge=0, le=10)]] = Field(
        default_factory=lambda: [0.0], min_length=1, description="Sampling temperatures; 0 is greedy."
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=lambda: [NEXT_TURN],
        description="Strings before which an answer ends; by default the template's next turn, into which a base model "
        "runs on.",
    )
    environment: EnvironmentSection | None = Field(
        default=None, description="Answer with an environment's tools, in several turns, as in rl; the last is judged."
    )
    max_tool_calling_iterations: int | None = Field(
        default=None, ge=1, description="With an environment: an answer's turns with calls; null sets no limit."
    )
    combine: Combine = Field(
        default="mean",
        description="With a reward model that has several heads: the mean of their scores, the minimum, or the mean "
        "minus the standard deviation.",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Maximum length of an answer, in tokens.")
    batch_size: int = Field(default=32, ge=1, description="Number of prompts (or pairs) processed at once.")
    limit: int | None = Field(default=None, ge=1, description="Use only this many rows, the first ones; null uses all.")

    def refusal(self) -> Refuse:
        """A function that returns why a row cannot be used for the task.

        Raises:
            ToolkitError: what judges answers, or the environment, is not there.
        """
        if self.environment is not None:
            self.environment.load().instance()
        if self.metric == "exact_match":
            from conversations.answers.rules import check_machine, needs_reference

            check_machine(self.rule, self.settings)
            if not needs_reference(self.rule):
                return no_question
            return first_of(no_reference, unreadable_reference([self.rule]))
        if self.judge is not None:
            self.judge.endpoint().key()
            return no_reference if self.judge.mode == "pairwise" else no_question
        return {
            "refusal": no_question,
            "format": no_question,
            "environment": no_question,
            "pair_accuracy": no_pair,
            "reward": not_judged,
            "loss": no_conversation,
        }[self.metric]

    @field_validator("temperatures")
    @classmethod
    def _have_distinct_names(cls, temperatures: list[float]) -> list[float]:
        names = [decoding_name(temperature) for temperature in temperatures]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"must differ within six digits: two of them are both named {repeated[0]}")
        return temperatures

    @field_validator("patterns")
    @classmethod
    def _regular_expressions(cls, patterns: list[str]) -> list[str]:
        compiled(tuple(patterns), "the pattern")
        return patterns

    @property
    def values(self) -> list[str]:
        """The names of the measured values, except n."""
        if self.metric in UNSAMPLED_METRICS:
            return [UNSAMPLED_METRICS[self.metric]]
        names = [decoding_name(temperature) for temperature in self.temperatures]
        return [*names, *(f"{name}_truncated" for name in names)]

    @model_validator(mode="after")
    def _only_what_the_metric_uses(self) -> "EvalTask":
        used = _USED_BY.get(self.metric, ())
        for name in ("rule", "settings", "judge", "patterns", "combine", *_OF_ANSWERS):
            if name not in used and getattr(self, name) != type(self).model_fields[name].get_default(
                call_default_factory=True
            ):
                raise ValueError(f"{name} has no effect on {self.metric}; leave it out")
        return self

    @model_validator(mode="after")
    def _fits_the_environment(self) -> "EvalTask":
        if self.environment is None and self.metric == "environment":
            raise ValueError("the metric environment needs environment: {python: FILE.py:CLASS}")
        if self.environment is None and self.max_tool_calling_iterations is not None:
            raise ValueError("max_tool_calling_iterations needs an environment; leave it out")
        if self.environment is not None and self.stop != [NEXT_TURN]:
            raise ValueError("stop and environment: answers in an environment end with a turn; leave one out")
        return self

    @model_validator(mode="after")
    def _has_a_judge(self) -> "EvalTask":
        if self.metric == "judge" and self.judge is None:
            raise ValueError("the metric judge needs judge: {base_url, model, rubric}")
        if self.judge is not None and self.judge.mode == "group":
            raise ValueError(
                "judge.mode: group compares several answers to a prompt, and an evaluation has one; use pairwise, with "
                "references"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_rule(self) -> "EvalTask":
        from conversations.answers.rules import check_rule

        if self.metric == "exact_match":
            check_rule(self.rule, self.settings)
        return self


def _kind_of_task(entry: Any) -> str:
    """Which kind an entry of `tasks` is, by its keys."""
    keys = entry if isinstance(entry, dict) else getattr(entry, "__dict__", {})
    if "task" not in keys:
        return _METRIC
    return _OPEN if keys["task"] == OPEN_ENDED else _BENCHMARK


# No recipe has such keys, which error messages would show.
_BENCHMARK, _METRIC, _OPEN = "a task of lm-eval", "a metric", "an open-ended task"
AnyTask = Annotated[
    Annotated[EvalTask, Tag(_METRIC)] | Annotated[BenchmarkTask, Tag(_BENCHMARK)] | Annotated[OpenTask, Tag(_OPEN)],
    Discriminator(_kind_of_task),
]


class EvalRecipe(StageRecipe):
    """Measures a model on held-out rows and records its answers."""

    stage: Literal["eval"] = Field(description="Which stage this is.")
    data: list[DataSource] = Field(default_factory=list, description="Rows for every task without data of its own.")
    models: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], ModelSection] = Field(
        default_factory=dict,
        description="Several models side by side, by name: a path, or what `model` has. Each has a run of its own in "
        "output_dir, and results.json compares them on the same rows.",
    )
    tasks: list[AnyTask] = Field(
        min_length=1,
        description="What to measure: metrics on rows (`metric`), tasks of lm-eval, or open-ended questions (`task`).",
    )
    chat_template: bool | None = Field(
        default=None,
        description="Whether prompts of lm-eval's tasks are rendered by the chat template; null: for what a run has "
        "trained and for models named chat or instruct.",
    )

    @model_validator(mode="before")
    @classmethod
    def _first_model(cls, recipe: Any) -> Any:
        """`models` with paths alone, and the first of them as `model`."""
        models = recipe.get("models") if isinstance(recipe, dict) else None
        if not isinstance(models, dict) or not models:
            return recipe
        models = {name: {"path": one} if isinstance(one, str) else one for name, one in models.items()}
        first = next(iter(models.values()))
        return {"model": first, **recipe, "models": models}

    @model_validator(mode="after")
    def _models_are_several(self) -> "EvalRecipe":
        if len(self.models) == 1:
            raise ValueError("models names one model; name two or more, or give it as `model`")
        if self.models and self.model != next(iter(self.models.values())):
            raise ValueError("models and model: give one of them; with several models leave `model` out")
        return self

    def parts(self) -> dict[str, "EvalRecipe"]:
        return {
            name: self.model_copy(update={"model": model, "models": {}, "output_dir": f"{self.output_dir}/{name}"})
            for name, model in self.models.items()
        }

    @model_validator(mode="after")
    def _tasks_fit_together(self) -> "EvalRecipe":
        names = [task.name for task in self.tasks]
        for task in self.tasks:
            is_loss = isinstance(task, EvalTask) and task.metric == "loss"
            if _RESERVED.search(task.name) or (task.name.endswith("loss") and not is_loss):
                raise ValueError(
                    f"a task cannot be called {task.name}: names ending in _n, _points, _interval, _t1 and "
                    "the like, or in loss with another metric, are reserved for other figures in results.json"
                )
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"tasks share a name: {', '.join(repeated)}")
        for task in self.metric_tasks.values():
            if not task.data and not self.data:
                raise ValueError(f"task {task.name} has no data: give it some, or give the recipe `data`")
        scored = {isinstance(task, EvalTask) and task.metric in SCORED for task in self.tasks}
        if len(scored) == 2:
            raise ValueError(
                f"{' and '.join(SCORED)} need a reward model, the other metrics a chat model: use two recipes"
            )
        return self

    @property
    def metric_tasks(self) -> dict[int, EvalTask]:
        """The tasks with a metric, by their place in `tasks`."""
        return {index: task for index, task in enumerate(self.tasks) if isinstance(task, EvalTask)}

    @property
    def head(self) -> Head:
        first = self.tasks[0]
        return "score" if isinstance(first, EvalTask) and first.metric in SCORED else "causal_lm"

    def files(self) -> dict[str, str]:
        return {
            f"rows of tasks.{index}.{key}": path
            for index, task in enumerate(self.tasks)
            if not isinstance(task, EvalTask)
            for key, path in task.files().items()
        }

    def other_models(self) -> list[ModelUse]:
        return [
            model_use(task.reward, f"tasks.{index}.reward")
            for index, task in enumerate(self.tasks)
            if isinstance(task, OpenTask) and task.reward.model is not None
        ]

    def row_lists(self) -> list[RowList]:
        return [
            RowList(
                task.name,
                f"tasks.{index}.data" if task.data else "data",
                task.data or self.data,
                task.refusal(),
                limit=task.limit,
                answer=f"tasks.{index}.max_new_tokens" if task.metric not in UNSAMPLED_METRICS else None,
                prompt=task.environment.prompts() if task.environment else prompt_of,
                read_whole=task.metric in UNSAMPLED_METRICS,
            )
            for index, task in self.metric_tasks.items()
        ]


_EXAMPLES = Path(__file__).parent / "tasks" / "rows"  # two rows of each form, written for this toolkit


def _there_or_example(entry: Mapping[str, Any]) -> Any:
    """A trial's rows: the task's own file if it is there, else example rows of its form."""
    example = _EXAMPLES / f"{entry.get('task')}.jsonl"
    path = entry["path"]
    return str(example) if isinstance(path, str) and not Path(path).exists() and example.is_file() else path


def _there_or_none(key: str) -> Callable[[Mapping[str, Any]], Any]:
    """A trial does without a file that is not there."""

    def kept(entry: Mapping[str, Any]) -> Any:
        path = entry[key]
        return path if isinstance(path, str) and Path(path).exists() else None

    return kept


def _reward_of_trial(entry: Mapping[str, Any]) -> Any:
    """A reward model that is not there gives random scores in a trial."""
    reward = entry["reward"]
    return {**reward, "if_missing": "random"} if isinstance(reward, dict) and "model" in reward else reward


STAGE = Stage(
    name="eval",
    recipe=EvalRecipe,
    help="evaluate a model",
    title="evaluation",
    run="eval.stage:run",
    check="eval.harness.checking:check",
    check_rows="eval.stage:check_list",
    result=RESULTS,
    measures=True,
    continues=SAMPLES,
    writes=(SAMPLES,),
    smoke=(
        Shrink("tasks", {"batch_size": 1, "max_new_tokens": 16, "limit": 2}),
        Shrink("tasks", {"path": _there_or_example}, where="path"),
        Shrink("tasks", {"num_fewshot": 0}, where="num_fewshot"),
        *(Shrink("tasks", {key: _there_or_none(key)}, where=key) for key in ("fewshot_path", "references")),
        Shrink("tasks", {"reward": _reward_of_trial}, where="reward"),
    ),
)
