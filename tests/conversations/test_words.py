"""Texts encoded a word at a time: the ids of the tokenizer's own encoding, for any text; only where that holds."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split
from transformers import PreTrainedTokenizerFast

from conversations.rendering.words import cuts_at_words, encode_by_words
from recipes.tiny.general_text import CHINESE, CODE, ENGLISH
from sft.data import encode_rows

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
LINES, LETTERS, SIGNS = "[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
# Neighbours of every kind: blanks, line ends, letters in and outside of the pattern, digits, signs, and an added token.
MESSY = st.text(st.sampled_from(" \t\r\n\u3000\u00a0\u2003\x1caZzéø12.,!-'`שלमि你好。‘😀\ufdd0"), max_size=30)
TEXTS = st.lists(st.one_of(MESSY, st.text(max_size=20)), max_size=6)


def stages(*changed: Any) -> list[Any]:
    """Those of the released tokenizer, the first of them changed."""
    released = [
        *(Split(Regex(pattern), "isolated") for pattern in (LINES, LETTERS, SIGNS, r"\s+$", "[一-龥ࠀ-一가-퟿]+")),
        Digits(individual_digits=True),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return [*changed, *released[len(changed) :]]


def trained(cuts: list[Any], **backend: Any) -> PreTrainedTokenizerFast:
    """BPE with the released tokenizer's kind of cuts, that knows runs of blanks and words of every script."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    blanks = ["a" + one * 2 + "1" + one * 3 + "b" for one in (" ", "\t", "\t ", " \t", "\u3000", "\n ", "\u2003")]
    texts = [ENGLISH, CHINESE, CODE, *(blanks * 5), *(["שלום שלום לכם, a1 b2 c  3 d ! e"] * 5)]
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=[BOS, EOS], initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    for name, value in backend.items():
        setattr(tokenizer, name, value)
    tokenizer.add_tokens([AddedToken("ø", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


released_like = cache(lambda: trained(stages()))


def whole(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@given(texts=TEXTS)
@example(["a  1", "a \t b", "1  b ", "שלום a b", "ø  1 ø b\n\n c", "x' y", " ", "", "a\u3000b \u3000c"])
def test_ids_are_those_of_the_whole_text(texts: list[str]):
    tokenizer = released_like()
    assert cuts_at_words(tokenizer)
    assert encode_by_words(texts, tokenizer) == whole(texts, tokenizer)


def with_added(token: AddedToken) -> Callable[[], PreTrainedTokenizerFast]:
    def make() -> PreTrainedTokenizerFast:
        tokenizer: Any = trained(stages())
        assert encode_by_words(["a b c"], tokenizer) == whole(["a b c"], tokenizer)
        tokenizer.add_tokens([token])
        return tokenizer

    return make


# What takes blanks or words together, and a text in which cutting at words would be seen.
OTHERS = {
    "words together": (
        lambda: trained(stages(Split(Regex(LINES), "isolated"), Split(Regex(r"[a-z ]+"), "isolated"))),
        "the way",
    ),
    "cut behind the blank": (lambda: trained(stages(Split(Regex(r"\S* "), "isolated"))), "a bc 12"),
    "a blank in the class": (
        lambda: trained(stages(Split(Regex(LINES), "isolated"), Split(Regex("\\s?[A-Za-z\x1b-!]+"), "isolated"))),
        "the way of",
    ),
    "words removed": (
        lambda: trained(stages(Split(Regex(LINES), "isolated"), Split(Regex(LETTERS), "merged_with_previous"))),
        "1 b",
    ),
    "normalized": (lambda: trained(stages(), normalizer=normalizers.Prepend("_")), "a b"),
    "added over a blank": (with_added(AddedToken("b c", normalized=False)), "a b c"),
    "added letters": (with_added(AddedToken("cat", normalized=False)), "1\t cat"),
    "added and blanks": (with_added(AddedToken("<x>", rstrip=True, normalized=False)), "<x>  b"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_get_whole_texts(name: str):
    make, text = OTHERS[name]
    tokenizer = make()
    assert not cuts_at_words(tokenizer)
    assert encode_by_words([text], tokenizer) == whole([text], tokenizer)


@given(
    conversations=st.lists(
        st.lists(st.tuples(MESSY.filter(str.strip), MESSY.filter(str.strip)), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_rows_are_those_of_each_text_by_itself(conversations: list[list[tuple[str, str]]]):
    """Of many rows at once: as the template and the tokenizer give them one by one."""
    tokenizer: Any = released_like()
    rows, expected = [], []
    for turns in conversations:
        messages = [zip(("user", "assistant"), turn, strict=True) for turn in turns]
        rows.append({"messages": [{"role": role, "content": text} for turn in messages for role, text in turn]})
        ids, labels = [tokenizer.bos_token_id], [-100]
        for user, assistant in turns:
            asked, answered = whole([f"User: {user}\n\nAssistant:", f" {assistant}"], tokenizer)
            ids += [*asked, *answered, tokenizer.eos_token_id]
            labels += [*[-100] * len(asked), *answered, tokenizer.eos_token_id]
        expected.append((ids, labels))
    data = encode_rows(rows, tokenizer, train_on="all_assistant", max_length=None, too_long="truncate").data
    assert [(row["input_ids"], row["labels"]) for row in data] == expected  # pyright: ignore[reportCallIssue, reportArgumentType]
