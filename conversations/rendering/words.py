"""Encodes texts word by word, each distinct word once, if the tokenizer splits at words itself: ten times less work.

The released tokenizer first splits off line breaks, then words: runs of letters, each with the space before it; all
later stages work inside these pieces. It therefore always splits before a space with a Latin letter on either side,
whatever the context, and the ids of a text are those of its parts. Other tokenizers get whole texts.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = Sequence[int]

# From the start of the text, or from a space next to a Latin letter, to the next such space.
_PART = re.compile(r"(?s:.)[^ ]*(?:(?<![A-Za-z]) (?![A-Za-z])[^ ]*)*")
_LINE_BREAKS, _WORDS = "[\r\n]", re.compile(r"\\s\?(\[A-Za-z[^\[\]\\&]*\])\+")
_INSIDE_PIECES = {"Split", "Digits", "ByteLevel"}  # stages that see one piece at a time
_ADDED_APART = re.compile(r"[^A-Za-z ]([^ ]*[^A-Za-z ])?")
_MOST_WORDS = 1 << 18  # limit of the cache, which bounds memory

# tokenizer -> (its size when it was checked, the words encoded so far; None if it does not split at words)
_words_of: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, dict[str, Ids] | None]]" = WeakKeyDictionary()


def encode_by_words(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The ids of each text, encoded separately and without special tokens."""
    words = _words(tokenizer)
    if words is None:
        return _encode(texts, tokenizer)
    if len(words) > _MOST_WORDS:
        words.clear()
    words_of_texts = [_PART.findall(text) for text in texts]
    unknown = list(set(chain.from_iterable(words_of_texts)).difference(words))
    if unknown:
        words.update(zip(unknown, map(tuple, _encode(unknown, tokenizer)), strict=True))
    return [list(chain.from_iterable(map(words.__getitem__, words_of_text))) for words_of_text in words_of_texts]


def _encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def _words(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Ids] | None:
    size, words = _words_of.get(tokenizer, (-1, None))
    if size != len(tokenizer):
        words = {} if cuts_at_words(tokenizer) else None
        _words_of[tokenizer] = (len(tokenizer), words)
    return words


def cuts_at_words(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the ids of a text are those of its parts, for any text."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is not None or backend.pre_tokenizer is None:
        return False
    if type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return False
    before = json.loads(backend.pre_tokenizer.__getstate__())
    return _begins_with_words(before.get("pretokenizers", [])) and _stand_apart(tokenizer.added_tokens_decoder.values())


def _begins_with_words(stages: Sequence[dict[str, Any]]) -> bool:
    if len(stages) < 2 or not all(stage["type"] in _INSIDE_PIECES for stage in stages):
        return False
    if any(stage.get("behavior") != "Isolated" or stage["invert"] for stage in stages[:2]):
        return False
    lines, words = (stage["pattern"].get("Regex", "") for stage in stages[:2])
    letters = _WORDS.fullmatch(words)
    return lines == _LINE_BREAKS and letters is not None and not re.match(letters[1], " ")


def _stand_apart(added: Iterable[Any]) -> bool:
    """Whether no added token removes a space, or a letter next to one, before the text is split."""
    return all(
        _ADDED_APART.fullmatch(token.content) and not (token.lstrip or token.rstrip or token.single_word)
        for token in added
    )
