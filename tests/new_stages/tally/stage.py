"""The loss of each row, by the model that is handed over."""

from typing import Any

from conversations.rendering.fitting import Encode, Fitter
from conversations.rendering.lengths import LengthReport
from conversations.stage import Work
from deepseek_v2_modeling.inference import token_losses
from deepseek_v2_modeling.training import append_lines
from tally.config import TallyRecipe


def encoder(recipe: TallyRecipe, tokenizer: Any, max_length: int | None) -> Encode:
    fitter = Fitter(tokenizer, max_length)
    return lambda row, report: [[piece] for piece in fitter.pieces(row, report)]


def run(recipe: TallyRecipe, work: Work) -> dict[str, Any]:
    encode, report = encoder(recipe, work.tokenizer, None), LengthReport()
    pieces = [piece for row in work.rows["data"] for sample in encode(row, report) for piece in sample]
    ids, masks = map(list, zip(*pieces, strict=True))
    pad = work.tokenizer.pad_token_id
    losses = token_losses(work.model, ids, masks, pad_token_id=pad, batch_size=recipe.size["batch"])
    append_lines(work.run_dir / "tally.jsonl", ({"loss": loss, "tokens": tokens} for loss, tokens in losses))
    return {"rows": len(losses)}
