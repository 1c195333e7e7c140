"""The tasks of a recipe that lm-eval runs, and open-ended ones: one after the other, on all processes."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState

from conversations.errors import ToolkitError
from conversations.run_files import RECIPE
from conversations.stage import OtherModel
from deepseek_v2_modeling import ModelError
from eval.config import BenchmarkTask, EvalRecipe, EvalTask, OpenTask
from eval.harness.crew import Crew
from eval.harness.figures import Figures, Sample
from eval.harness.loading import one_line
from eval.harness.responses import Responses

_CHAT_NAMES = ("chat", "instruct")


class Benchmarks:
    """Measures tasks of lm-eval and open-ended ones. The first process runs them; the others help it.

    others: the reward models of open-ended tasks, by the task's name.
    """

    def __init__(
        self,
        recipe: EvalRecipe,
        model: Any,
        tokenizer: Any,
        state: PartialState,
        run_dir: Path,
        resume: bool,
        others: Mapping[str, OtherModel],
    ):
        self.seed, self.state, self.run_dir, self.others = recipe.seed, state, run_dir, others
        self.chat = chat_of(recipe)
        self.crew = None
        if any(isinstance(task, BenchmarkTask) for task in recipe.tasks):
            need_lm_eval()
        if any(not isinstance(task, EvalTask) for task in recipe.tasks):
            self.crew = Crew(model, tokenizer, state, Responses(run_dir, state, resume))

    def measure(self, task: BenchmarkTask | OpenTask) -> tuple[Figures, list[Sample]]:
        """(figures, samples) of a task; {"n": 0, "error": why} and none if it fails. Other processes get no samples."""
        assert self.crew is not None
        if not self.state.is_main_process:
            return self.crew.help(), []
        figures, samples = self._measured(task, self.crew)
        self.crew.dismiss(figures)
        return figures, samples

    def _measured(self, task: BenchmarkTask | OpenTask, crew: Crew) -> tuple[Figures, list[Sample]]:
        try:
            if isinstance(task, OpenTask):
                from eval.open_ended.measuring import measure as measure_open

                return measure_open(task, crew, self.seed, self.others.get(task.name), self.run_dir)
            from eval.harness.running import measure

            return measure(task, crew, self.seed, self.chat)
        except (ToolkitError, ModelError) as error:
            return {"n": 0, "error": str(error)}, []
        except OSError:
            raise  # a full disk: no other task would fare better
        except Exception as error:  # the task's own code
            return {"n": 0, "error": one_line(error)}, []

    def close(self, done: bool) -> None:
        """Forget the raw answers if all tasks are done."""
        self.state.wait_for_everyone()
        if self.crew is not None and done and self.state.is_main_process:
            self.crew.responses.remove()


def need_lm_eval() -> None:
    """Raise ToolkitError in an environment made before lm-eval was needed."""
    if find_spec("lm_eval") is None:
        raise ToolkitError("tasks of lm-eval need the package lm_eval: pip install -c constraints.txt -e .")


def chat_of(recipe: EvalRecipe) -> bool:
    """Whether prompts are rendered by the chat template."""
    return is_chat_variant(recipe.model.path) if recipe.chat_template is None else recipe.chat_template


def is_chat_variant(path: str) -> bool:
    """Whether a model is one that answers conversations: what a run has trained, or named like a chat model."""
    folder = Path(path)
    from_run = any((place / RECIPE).is_file() for place in (folder, folder.parent))
    return from_run or any(name in folder.name.lower() for name in _CHAT_NAMES)
