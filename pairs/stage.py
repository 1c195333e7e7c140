"""Makes preference data: samples several answers to each prompt, judges them, and pairs better with worse ones."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from conversations import render_conversation
from conversations.answers.prompts import prompt_of, prompt_text
from conversations.generation.generating import generate_texts, print_obeyed, seed_of
from conversations.generation.sample_files import Sample, SampleFiles
from conversations.progress import bar
from conversations.rewards.base import Answer, Reward
from conversations.rewards.model import RewardModelReward
from conversations.rewards.terms import check_rewards, opened_rewards
from conversations.row import Row
from conversations.run_files import RESULTS
from conversations.stage import Work
from deepseek_v2_modeling.training import append_lines, write_json, write_lines
from pairs.config import BEST, PAIRS, SCORED, PairsRecipe
from pairs.writing import DIGITS, OTHERS, preference_data, total_of, verifiers_of

CHUNK_BATCHES = 4  # batches of answers to generate before judging and writing them
PLACE = ("row", "answer")  # what identifies a sample

Numbered = Sequence[tuple[int, Row]]  # rows with their number, from 0


def run(recipe: PairsRecipe, work: Work) -> dict[str, Any]:
    """Run `make_pairs` with the data and models that `dsv2` has loaded; returns its results."""
    with opened_rewards(recipe.rewards, work.others, work.run_dir) as rewards:
        return make_pairs(
            recipe,
            model=work.model,
            tokenizer=work.tokenizer,
            rows=work.rows["data"],
            rewards=rewards,
            run_dir=work.run_dir,
            resume=work.resume,
        )


def check_rows(recipe: PairsRecipe, name: str, rows: Sequence[Row]) -> None:
    """Raise ToolkitError if a reward cannot score any answer to these prompts."""
    check_rewards(recipe.rewards, rows[: recipe.limit])


def make_pairs(
    recipe: PairsRecipe,
    *,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    rewards: Sequence[Reward],
    run_dir: Path,
    resume: bool = False,
) -> dict[str, Any]:
    """Write pairs.jsonl, scored.jsonl, best.jsonl, results.json, and samples.jsonl with every answer and its verdicts.

    The prompts are divided among the processes. An answer depends only on the recipe's seed, the number of its prompt
    and its own number, not on the number of processes or the batch.

    Args:
        model: a language model, which is not trained.
        rows: canonical rows; the prompt is everything before the last answer.
        rewards: the terms of the reward, with their weights.
        resume: reuse the answers that an interrupted run of the same recipe left in run_dir.

    Returns:
        The contents of results.json (see `preference_data`).
    """
    state = PartialState() if torch.cuda.is_available() else PartialState(cpu=True)
    model.to(state.device)
    for reward in rewards:
        if isinstance(reward, RewardModelReward):
            reward.move(state.device)
    if state.is_main_process:
        print_obeyed("pairs", model)
    rows = list(rows)[: recipe.limit]
    files = SampleFiles(run_dir, PLACE)
    kept = files.open(state, resume)
    if resume and state.is_main_process:
        print(f"pairs: {len(kept):,} answers of the interrupted run are reused", file=sys.stderr, flush=True)
    numbered = list(enumerate(rows))[state.process_index :: state.num_processes]
    with bar("pairs", len(numbered), "prompts", shows=state.is_main_process) as advance:
        for chunk in _chunks(numbered, recipe):
            places = [(row, answer) for row, _ in chunk for answer in range(recipe.num_generations)]
            if not all(place in kept for place in places):  # regenerate the whole chunk, in the same batches
                append_lines(
                    files.of_process(state.process_index), _judged_answers(recipe, chunk, model, tokenizer, rewards)
                )
            advance(len(chunk))
    state.wait_for_everyone()
    if state.is_main_process:
        files.gather()
        samples = sorted(files.kept().values(), key=files.place)
        write_lines(files.path, samples)
        _write(recipe, rows, samples, rewards, run_dir)
    state.wait_for_everyone()
    return json.loads((run_dir / RESULTS).read_text(encoding="utf-8"))


def _chunks(numbered: Numbered, recipe: PairsRecipe) -> Iterator[Numbered]:
    size = max(1, CHUNK_BATCHES * recipe.batch_size // recipe.num_generations)
    return (numbered[start : start + size] for start in range(0, len(numbered), size))


def _judged_answers(
    recipe: PairsRecipe, rows: Numbered, model: Any, tokenizer: Any, rewards: Sequence[Reward]
) -> list[Sample]:
    """Generate and judge answers to these prompts."""
    places = [(number, row, answer) for number, row in rows for answer in range(recipe.num_generations)]
    prompts = {number: prompt_of(row, number + 1) for number, row in rows}
    ids = {
        number: render_conversation(prompt, tokenizer, add_generation_prompt=True)["input_ids"]
        for number, prompt in prompts.items()
    }
    generated = generate_texts(
        model,
        tokenizer,
        [ids[number] for number, _, _ in places],
        [seed_of(recipe.seed, number, answer, f"{recipe.temperature:g}") for number, _, answer in places],
        temperature=recipe.temperature,
        max_new_tokens=recipe.max_new_tokens,
        batch_size=recipe.batch_size,
    )
    answers = [
        Answer(prompts[number], said.text, said.finished, row.get("reference"), said.tokens)
        for (number, row, _), said in zip(places, generated, strict=True)
    ]
    return [
        {
            "row": number,
            "answer": index,
            "prompt": prompt_text(answer.prompt),
            "completion": answer.text,
            "truncated": not answer.finished,
            "tokens": answer.tokens,
            **verdicts,
            **({} if answer.reference is None else {"reference": answer.reference}),
        }
        for (number, _, index), answer, verdicts in zip(places, answers, _judge(rewards, answers), strict=True)
    ]


def _judge(rewards: Sequence[Reward], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """For each answer: {"reward": weighted sum, "rewards": {name: value}, "reasons": {name: text}}."""
    judged: list[dict[str, Any]] = [{"rewards": {}, "reasons": {}} for _ in answers]
    for reward in rewards:
        values = reward.judged(answers)
        for verdict, value, reason in zip(judged, values, reward.reasons, strict=True):
            verdict["rewards"][reward.name] = None if value is None else round(value, DIGITS)
            verdict["reasons"] |= {} if reason is None else {reward.name: reason}
    weights = {reward.name: reward.weight for reward in rewards}
    return [{"reward": total_of(verdict["rewards"], weights), **verdict} for verdict in judged]


def _write(
    recipe: PairsRecipe, rows: Sequence[Row], samples: Sequence[Sample], rewards: Sequence[Reward], run_dir: Path
) -> None:
    """Write the result files and print a summary. pairs.jsonl comes last, since it marks the run as complete."""
    weights = {reward.name: reward.weight for reward in rewards}
    files, results = preference_data(recipe, rows, samples, weights, verifiers_of(rewards))
    write_json(run_dir / RESULTS, results)
    for name in (SCORED, BEST, PAIRS):
        write_lines(run_dir / name, files[name])
    for line in (_summary(results), *(f"pairs: {summary}" for reward in rewards if (summary := reward.summary()))):
        print(line, file=sys.stderr, flush=True)


def _summary(results: Mapping[str, Any]) -> str:
    prompts, answers, usable, pairs = (f"{results[name]:,}" for name in ("prompts", "answers", "usable", "pairs"))
    others = ", ".join(f"{results[name]:,} {name}" for name in OTHERS)
    right = ""
    if results["all_right"] is not None:
        right = f" ({results['all_right']:,} all right, {results['all_wrong']:,} all wrong)"
    reasons = [f"{count:,} by {name}" for name, count in results["left_out"].items() if count]
    left_out = f"; left out: {', '.join(reasons)}" if reasons else ""
    return (
        f"pairs: {prompts} prompts{right}, {answers} answers ({others}); "
        f"{usable} prompts usable; {pairs} pairs{left_out}"
    )
