"""Encodes runs of text into token ids and loss masks, so that text cannot forge control tokens.

Where a text contains the string of a special token (or of an added token of the shape <｜...｜>, such as the
fill-in-the-middle tokens, which the released tokenizer does not call special), it is cut inside that string and
becomes ordinary text, which decodes to the same characters.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from conversations.errors import ToolkitError
from conversations.rendering.words import encode_by_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Whether it is trained, and a text to encode by itself, or a token id that stands for itself.
Run = tuple[bool, str | int]
Known = dict[str, list[int]]  # texts that have been encoded, and their ids

_CONTROL_SHAPE = re.compile(r"<[|｜].+[|｜]>")

# tokenizer -> (its size when the pattern was made, the pattern of its control tokens)
_control_patterns: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, re.Pattern[str]]]" = WeakKeyDictionary()


def special_ids_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """The ids of "bos" (none where the tokenizer has none: it begins without one) and "eos"."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ToolkitError("the tokenizer has no end token; set its eos_token")
    return {"bos": [bos] if isinstance(bos, int) else [], "eos": [eos]}


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A hash of everything that a text's ids depend on; None for a slow tokenizer."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend.no_truncation()  # as each encoding does, so that what was encoded before changes nothing
    backend.no_padding()
    own = [type(tokenizer).__name__, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.split_special_tokens]
    return hashlib.sha256((backend.to_str() + json.dumps(own)).encode("utf-8", "surrogatepass")).hexdigest()


def encode_texts(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> Known:
    """The token ids of each text, encoded separately: one call of the tokenizer, each distinct text once."""
    once = list(dict.fromkeys(texts))
    if not once:
        return {}
    encoded = encode_by_words(once, tokenizer)
    own = {token for ids in special_ids_of(tokenizer).values() for token in ids}
    for text, ids in zip(once, encoded, strict=True):
        if not own.isdisjoint(ids):
            raise ToolkitError(
                f"the tokenizer encodes the plain text {text[:80]!r} as its begin or end token; text in a row could "
                "then forge the end of an answer: use different begin and end tokens"
            )
    return dict(zip(once, encoded, strict=True))


def texts_of(runs: Iterable[Run]) -> Iterator[str]:
    """What the tokenizer has to encode."""
    return (piece for _, piece in runs if isinstance(piece, str))


def encode_runs(
    runs: Iterable[Run], tokenizer: "PreTrainedTokenizerBase", known: Known | None = None
) -> dict[str, list[int]]:
    """`input_ids` and `assistant_mask` of consecutive runs.

    known: ids of texts that are already encoded; the ids of the others are added.
    """
    runs, known = list(runs), {} if known is None else known
    known.update(encode_texts((text for text in texts_of(runs) if text not in known), tokenizer))
    input_ids: list[int] = []
    assistant_mask: list[int] = []
    for is_trained, piece in runs:
        ids = known[piece] if isinstance(piece, str) else [piece]
        input_ids += ids
        assistant_mask += [int(is_trained)] * len(ids)
    return {"input_ids": input_ids, "assistant_mask": assistant_mask}


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
        places = [f"(?<={re.escape(first)})(?={'|'.join(seconds)})" for first, seconds in rests.items()]
        pattern = re.compile("|".join(places) or "(?!)")
        _control_patterns[tokenizer] = (len(tokenizer), pattern)
    return pattern
