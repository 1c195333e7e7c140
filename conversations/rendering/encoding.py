"""Encodes runs of text into token ids and loss masks, so that text cannot forge control tokens.

If a text contains the string of a special token (or of an added token of the form <｜...｜>, such as the
fill-in-the-middle tokens, which the released tokenizer does not mark as special), it is split inside that string: it
becomes ordinary tokens, which decode to the same characters.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from conversations.errors import ToolkitError
from conversations.rendering.own_template import CONTROL_SHAPE
from conversations.rendering.template import template_of
from conversations.rendering.words import encode_by_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (whether it is trained, a text to encode separately or a token id).
Run = tuple[bool, str | int]
EncodedTexts = dict[str, list[int]]  # text -> its token ids

# tokenizer -> (its size when the pattern was built, the pattern of its control tokens)
_control_patterns: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, re.Pattern[str]]]" = WeakKeyDictionary()


def special_ids_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """The ids of "bos" (an empty list if the tokenizer has none) and "eos"."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ToolkitError("the tokenizer has no end token; set its eos_token")
    return {"bos": [bos] if isinstance(bos, int) else [], "eos": [eos]}


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A hash of everything that a text's ids depend on; None for a slow tokenizer."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend.no_truncation()  # as every encoding does, so that the hash does not depend on earlier calls
    backend.no_padding()
    settings = [
        type(tokenizer).__name__,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.split_special_tokens,
        template_of(tokenizer).text,
    ]
    return hashlib.sha256((backend.to_str() + json.dumps(settings)).encode("utf-8", "surrogatepass")).hexdigest()


def encode_texts(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> EncodedTexts:
    """The token ids of each text, encoded separately: one tokenizer call, each distinct text once."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    encoded = encode_by_words(distinct, tokenizer)
    special = {token for ids in special_ids_of(tokenizer).values() for token in ids}
    for text, ids in zip(distinct, encoded, strict=True):
        if not special.isdisjoint(ids):
            raise ToolkitError(
                f"the tokenizer encodes the plain text {text[:80]!r} as its begin or end token; text in a row could "
                "then forge the end of an answer: use different begin and end tokens"
            )
    return dict(zip(distinct, encoded, strict=True))


def texts_of(runs: Iterable[Run]) -> Iterator[str]:
    """The texts that the tokenizer has to encode."""
    return (piece for _, piece in runs if isinstance(piece, str))


def encode_runs(
    runs: Iterable[Run], tokenizer: "PreTrainedTokenizerBase", encoded: EncodedTexts | None = None
) -> dict[str, list[int]]:
    """`input_ids` and `assistant_mask` of consecutive runs.

    encoded: ids of texts that are already encoded; the ids of the others are added to it.
    """
    runs, encoded = list(runs), {} if encoded is None else encoded
    encoded.update(encode_texts((text for text in texts_of(runs) if text not in encoded), tokenizer))
    input_ids: list[int] = []
    assistant_mask: list[int] = []
    for is_trained, piece in runs:
        ids = encoded[piece] if isinstance(piece, str) else [piece]
        input_ids += ids
        assistant_mask += [int(is_trained)] * len(ids)
    return {"input_ids": input_ids, "assistant_mask": assistant_mask}


def control_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """A pattern that splits text after the first character of every control token (see the module docstring)."""
    size, pattern = _control_patterns.get(tokenizer, (-1, re.compile("(?!)")))
    if size != len(tokenizer):
        added = tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special or CONTROL_SHAPE.fullmatch(token.content)}
        rests: dict[str, list[str]] = {}  # by first character, for speed: few positions in a text need a closer look
        for token in sorted(token for token in tokens if len(token) > 1):
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
        # Empty matches, so that overlapping tokens are found too.
        places = [f"(?<={re.escape(first)})(?={'|'.join(seconds)})" for first, seconds in rests.items()]
        pattern = re.compile("|".join(places) or "(?!)")
        _control_patterns[tokenizer] = (len(tokenizer), pattern)
    return pattern
