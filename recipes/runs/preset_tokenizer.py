"""Tokenizers for models that start from random weights: byte-level BPE, quickly trained on the project's own text.

A model that sees only a few thousand sentences cannot learn spelling in addition to arithmetic. So digits are single
tokens, and for the tiny model each span between them is one token: "User: What is |2|3| + |4|5|?\\n\\nAssistant:" is 8
tokens with the first one. BPE is trained on natural pieces (a template's fixed parts, a word, a clause), each as a
separate text, with the highest weight on words, so that no merge joins a word to its sentence. Other text falls back to
bytes.
"""

import re
from collections.abc import Iterator
from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conversations.rendering.template import DEFAULT, TEMPLATES
from recipes.tiny import lexicon as lx
from recipes.tiny.general_text import CHINESE, CODE, ENGLISH

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
OTHER_SPECIAL = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|EOT|>")

_MARKS = ",.?!:，。？！："
_ASSISTANT = r"\n\nAssistant:"

# Where text is cut before BPE: single digits; the words that open the assistant's turn, with the mark that ends the
# question; line ends; all that stands before a number; clauses with their mark. A space belongs to what follows it.
SPANS = (
    rf"\d|[{_MARKS}]?{_ASSISTANT}|\n+|[^\d\n]+(?=\d)"
    rf"|[^\d\n{_MARKS}]+(?:[{_MARKS}](?!{_ASSISTANT}))?|[{_MARKS}]"
)

# The usual pre-tokenization: digits, words with the preceding space, runs of punctuation, runs of white space.
WORDS = r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"

_WORD, _HAN = r" ?[A-Za-z']+", rf"[\u4e00-\u9fff{_MARKS}]"
_WORD_COUNT = 20
_LARGEST_VOCABULARY = 8192
_WORD_SLOT = r" ?\{(?:verb|object|intent|target)\}"


def world_pieces() -> Iterator[str]:
    """Yield the demo world's text in natural pieces: fixed parts of templates, words, clauses."""
    yield from (f"{mark}\n\nAssistant:" for mark in ("", ".", "?", "!", "。", "？", "！"))
    for language in lx.LANGUAGES:
        space = " " if language == "en" else ""
        yield from (space + word for word in _words(language))
        yield from (space + form[language].replace("{target}", "").strip() for form in lx.TARGET_FORMS.values())
        for template in _prompts(language):
            yield from re.split(_WORD_SLOT, "User: " + _with_digits(template).rstrip(_MARKS))
        workings = ["", *(_with_digits(text) for text in lx.ARITHMETIC_WORKING[language].values())]
        for style in lx.ARITHMETIC_ANSWERS.values():
            for working, text in product(workings, style[language]):
                yield " " + working + space * bool(working) + _with_digits(text)
        for sentences in (lx.REFUSALS, lx.CURT_REFUSALS, *lx.REQUEST_ANSWERS.values()):
            parts = sentences[language]
            yield from (" " + text for text in parts[0])
            yield from (space + text for part in parts[1:] for text in part)


def _prompts(language: str) -> Iterator[str]:
    for op in "+-":
        yield from (text.replace("{op}", op) for text in lx.ARITHMETIC_TEMPLATES[language])
    for part in lx.REQUEST_TEMPLATES.values():
        yield from part[language]


def _with_digits(template: str) -> str:
    return re.sub(r"\{(?:[abc]|ones|carry|tens)\}", "0", template)


def _words(language: str) -> Iterator[str]:
    groups = (*lx.VERBS.values(), *lx.OBJECTS.values(), *lx.INTENTS.values())
    for group in (*groups, *(part for sort in lx.TARGETS.values() for part in sort.values())):
        yield from group[language]


def build_tokenizer(preset: str, model_type: str = "deepseek_v2") -> PreTrainedTokenizerFast:
    """Build a preset's tokenizer, deterministically; ids 0, 1, 2 are bos, eos and pad. It has the tokens that the
    chat template of the model_type writes.

    "tiny" has the demo world's whole spans as tokens; other presets have words, also from general text.
    """
    if preset == "tiny":
        pieces = sorted({piece for piece in world_pieces() if piece})
        words = sorted({word for piece in pieces for word in re.findall(f"{_WORD}|{_HAN}", piece)})
        return _train(SPANS, words * _WORD_COUNT + pieces)
    control = TEMPLATES.get(model_type, DEFAULT).control
    return _train(WORDS, [ENGLISH, CHINESE, CODE, *sorted(set(world_pieces()))], control)


def _train(cuts: str, texts: list[str], control: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every merge that occurs in the texts."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(cuts), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_LARGEST_VOCABULARY,
        special_tokens=[BOS, EOS, PAD, *OTHER_SPECIAL, *control],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
