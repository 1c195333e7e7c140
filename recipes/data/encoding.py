"""Encodes rows as their stage does, into token ids and masks, without loading any weights."""

from typing import Any

from conversations.answers.prompts import Row, prompt_of
from conversations.rendering.conversation import render_conversation
from conversations.rendering.fitting import Encode, Piece
from conversations.rendering.lengths import LengthReport
from conversations.sections import StageRecipe
from conversations.stage import provided
from recipes.stages import stage_of


def encoder(recipe: StageRecipe, tokenizer: Any, max_length: int | None) -> Encode:
    """The encoding function of the recipe's stage; for rows that a model is to answer, it encodes the prompt."""
    if encode := stage_of(recipe).encode:
        return provided(encode)(recipe, tokenizer, max_length)

    def encode_prompt(row: Row, report: LengthReport) -> list[list[Piece]]:
        report.rows += 1
        ids = render_conversation(prompt_of(row, report.rows), tokenizer, add_generation_prompt=True)["input_ids"]
        report.lengths.append(len(ids))
        return [[(ids, [0] * len(ids))]]

    return encode_prompt
