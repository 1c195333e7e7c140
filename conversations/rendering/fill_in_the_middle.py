"""Plain text -> token ids and loss mask: language modelling, or fill-in-the-middle with DeepSeek-Coder's tokens.

All tokens except the begin token are trained. In fill-in-the-middle (Bavarian et al., arXiv 2207.14255) the text is
split at two random characters, and its middle comes last:

    psm    <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle    DeepSeek-Coder, half its files
    spm    <｜fim▁begin｜> <｜fim▁hole｜> suffix <｜fim▁end｜> prefix middle    not seen by the released models
"""

import random
from typing import TYPE_CHECKING, Any, Literal

from conversations.errors import ToolkitError
from conversations.rendering.encoding import Run, control_pattern, encode_runs, special_ids_of
from conversations.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FimMode = Literal["psm", "spm"]

TOKENS = {"begin": "<｜fim▁begin｜>", "hole": "<｜fim▁hole｜>", "end": "<｜fim▁end｜>"}
_ORDERS: dict[FimMode, tuple[str, ...]] = {
    "psm": ("begin", "prefix", "hole", "suffix", "end", "middle"),
    "spm": ("begin", "hole", "suffix", "end", "prefix", "middle"),
}


def with_hole(row: Row, rate: float, mode: FimMode, rng: random.Random) -> Row:
    """With probability `rate`, the row with `fim` {mode, start, end} (characters of its middle); otherwise
    unchanged."""
    if rng.random() >= rate:
        return row
    start, end = sorted(rng.randint(0, len(row["text"])) for _ in range(2))
    return row | {"fim": {"mode": mode, "start": start, "end": end}}


def fim_ids(tokenizer: "PreTrainedTokenizerBase", where: str = "data.fim") -> dict[str, int]:
    """The ids of "begin", "hole" and "end". where: what needs them, for messages.

    Raises:
        ToolkitError: the tokenizer lacks one of these tokens.
    """
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    missing = [TOKENS[name] for name, token_id in ids.items() if token_id in (None, tokenizer.unk_token_id)]
    if missing:
        raise ToolkitError(
            f"{where}: the tokenizer has no {', '.join(missing)}; fill-in-the-middle needs a model that knows these "
            "tokens, such as DeepSeek-Coder-V2"
        )
    return ids


def render_text(row: Row, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """Render a row of plain text: begin token, the text (with its middle last if the row has `fim`), end token.

    Returns:
        `input_ids` and `assistant_mask`, two lists of equal length; the mask is 1 on trained tokens.

    Raises:
        ToolkitError: as `fim_ids`, if the row has `fim`; a tokenizer without an end token, or one that encodes plain
            text as its begin or end token.
    """
    return encode_runs(text_runs(row, tokenizer), tokenizer)


def text_runs(row: Row, tokenizer: "PreTrainedTokenizerBase") -> list[Run]:
    """The runs that `render_text` encodes separately; raises the same errors, except the last."""
    special = special_ids_of(tokenizer)
    control = control_pattern(tokenizer)
    pieces: list[str | int] = []
    for part in _ordered_pieces(row, tokenizer):
        pieces += [part] if isinstance(part, int) else control.split(part)
    return [*((False, token) for token in special["bos"]), *((True, piece) for piece in (*pieces, *special["eos"]))]


def _ordered_pieces(row: Row, tokenizer: "PreTrainedTokenizerBase") -> list[str | int]:
    text, fim = row["text"], row.get("fim")
    if fim is None:
        return [text]
    start, end = fim["start"], fim["end"]
    pieces = {"prefix": text[:start], "middle": text[start:end], "suffix": text[end:], **fim_ids(tokenizer)}
    return [pieces[name] for name in _ORDERS[fim["mode"]]]
