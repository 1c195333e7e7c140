"""Runs lm-eval on one entry of a recipe's tasks."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from conversations.tally import counted
from eval.config import BenchmarkTask
from eval.harness.contamination import GRAM, contaminated
from eval.harness.crew import Crew
from eval.harness.figures import Figures, Sample, figures_of, logged, rows_of, sample_lines
from eval.harness.loading import Built, build, check_tokens


def measure(entry: BenchmarkTask, crew: Crew, seed: int, chat: bool) -> tuple[Figures, list[Sample]]:
    """(figures, samples) of an entry.

    chat: whether prompts are rendered by the chat template.

    Raises:
        ToolkitError: the task or its rows cannot be used.
    """
    from lm_eval.evaluator import evaluate

    from eval.harness.lm import ToolkitLM

    with quiet_lm_eval():
        built = build(entry, chat)
        check_tokens(built, crew.tokenizer)
        for line in described(built, chat):
            print(f"eval: {entry.name}: {line}", file=sys.stderr, flush=True)
        crew.batch_size = entry.batch_size
        positions = crew.model.config.max_position_embeddings
        lm = ToolkitLM(crew.tokenizer, positions, crew, seed, entry.too_long, entry.generation, entry.stop)
        results: Any = evaluate(
            lm,
            {"tasks": dict(built.tasks), "groups": {}},
            limit=entry.limit,
            bootstrap_iters=0,  # intervals are ours, clustered by prompt
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    if lm.cut:
        print(f"eval: {entry.name}: {counted(lm.cut, 'prompt')} cut to fit", file=sys.stderr, flush=True)
    logs = {name: logged(task, results["samples"][name], _temperature(lm, task)) for name, task in built.tasks.items()}
    lines = sample_lines(entry, logs)
    if entry.against:
        rows = contaminated(rows_of(logs), entry.against)
        lines = [{**line, "contaminated": line["row"] in rows} for line in lines]
        total = len({line["row"] for line in lines})
        print(f"eval: {entry.name}: {len(rows):,} of {total:,} rows share {GRAM} words with `against`", file=sys.stderr)
    return figures_of(entry, logs, lines), lines


def _temperature(lm: Any, task: Any) -> float:
    return lm.decoding(task.config.generation_kwargs).temperature if task.OUTPUT_TYPE == "generate_until" else 0.0


def described(built: Built, chat: bool) -> Iterator[str]:
    """Yield what the user should know of a task before it runs."""
    shots = {task.get_config("num_fewshot") or 0 for task in built.tasks.values()}
    template = "with the chat template" if chat else "without a chat template"
    yield f"{template}, {' or '.join(f'{number}' for number in sorted(shots))}-shot"
    yield from built.notes


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Without lm-eval's progress bars and notices, of which one or more stand for each task."""
    import lm_eval.api.task as module
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, module.tqdm
    logger.setLevel(logging.ERROR)
    module.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        module.tqdm = bars
