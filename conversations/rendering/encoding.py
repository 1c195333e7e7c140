"""Pieces of text -> token ids, so that text cannot forge control tokens.

Where a text contains the string of a special token (or of an added token of the shape <｜...｜>, such as the
fill-in-the-middle tokens, which the released tokenizer does not call special), it is cut inside that string and
becomes ordinary text, which decodes to the same characters.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from conversations.errors import ToolkitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL_SHAPE = re.compile(r"<[|｜].+[|｜]>")

# tokenizer -> (its size when the pattern was made, the pattern of its control tokens)
_control_patterns: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, re.Pattern[str]]]" = WeakKeyDictionary()


def special_ids_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """The ids of "bos" (none where the tokenizer has none: it begins without one) and "eos"."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ToolkitError("the tokenizer has no end token; set its eos_token")
    return {"bos": [bos] if isinstance(bos, int) else [], "eos": [eos]}


def encode_pieces(pieces: Sequence[str | int], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids of each piece; an id stands for itself."""
    texts = [piece for piece in pieces if isinstance(piece, str)]
    encoded: Any = {"input_ids": []}
    if texts:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    own = {token for ids in special_ids_of(tokenizer).values() for token in ids}
    for text, ids in zip(texts, encoded["input_ids"], strict=True):
        if not own.isdisjoint(ids):
            raise ToolkitError(
                f"the tokenizer encodes the plain text {text[:80]!r} as its begin or end token; the end of an answer "
                "could then be forged by its words: use other begin and end tokens"
            )
    encoded_texts = iter(encoded["input_ids"])
    return [[piece] if isinstance(piece, int) else list(next(encoded_texts)) for piece in pieces]


def control_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """A pattern that splits text after the first character of every control token (see the file's head)."""
    size, pattern = _control_patterns.get(tokenizer, (-1, re.compile("(?!)")))
    if size != len(tokenizer):
        added = tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special or _CONTROL_SHAPE.fullmatch(token.content)}
        rests: dict[str, list[str]] = {}  # by first character, for speed: few places in a text are looked at further
        for token in sorted(token for token in tokens if len(token) > 1):
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
        # Empty matches, after the first character of a token: so overlapping tokens are found too.
        places = [f"(?<={re.escape(first)})(?={'|'.join(found)})" for first, found in rests.items()]
        pattern = re.compile("|".join(places) or "(?!)")
        _control_patterns[tokenizer] = (len(tokenizer), pattern)
    return pattern
