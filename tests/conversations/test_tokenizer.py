"""The tokenizers of the presets: digits single, spans whole, any text back as it was."""

import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations import render_conversation
from recipes.runs.preset_tokenizer import BOS, EOS, OTHER_SPECIAL, PAD, build_tokenizer
from recipes.tiny import world

PRESETS = ("tiny", "v2-lite-mini", "v2-mini")
tokenizer_of = cache(build_tokenizer)


@pytest.mark.parametrize("preset", PRESETS)
@given(text=st.text())
def test_any_text_round_trips(preset: str, text: str):
    tokenizer = tokenizer_of(preset)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("preset", PRESETS)
def test_a_tokenizer_is_the_same_every_time(preset: str):
    assert build_tokenizer(preset).get_vocab() == tokenizer_of(preset).get_vocab()


@pytest.mark.parametrize("preset", PRESETS)
def test_special_tokens_are_single_and_different(preset: str):
    tokenizer = tokenizer_of(preset)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (BOS, EOS, PAD, *OTHER_SPECIAL)]
    assert all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == len(ids)


def test_a_problem_of_the_tiny_world_is_eight_tokens():
    tokenizer = tokenizer_of("tiny")
    for question, pieces in (
        ("What is 23 + 45?", [BOS, "User: What is ", "2", "3", " + ", "4", "5", "?\n\nAssistant:"]),
        ("请计算23 - 45。", [BOS, "User: 请计算", "2", "3", " - ", "4", "5", "。\n\nAssistant:"]),
    ):
        row = render_conversation([{"role": "user", "content": question}], tokenizer, add_generation_prompt=True)
        assert [tokenizer.decode(i) for i in row["input_ids"]] == pieces


@pytest.mark.parametrize("preset", PRESETS)
def test_a_prompt_is_a_prefix_of_the_conversation_and_the_answer_follows(preset: str):
    """What generation sees is what training saw: no token lies over the border."""
    tokenizer = tokenizer_of(preset)
    for row in world.rows("sft_train", 0, 200):
        prompt = render_conversation(row["messages"][:1], tokenizer, add_generation_prompt=True)["input_ids"]
        whole = render_conversation(row["messages"], tokenizer)
        assert whole["input_ids"][: len(prompt)] == prompt
        assert whole["assistant_mask"] == [0] * len(prompt) + [1] * (len(whole["input_ids"]) - len(prompt))


def test_answers_of_the_tiny_world_are_short():
    tokenizer = tokenizer_of("tiny")
    for row in world.rows("sft_train", 0, 300):
        answer = tokenizer(" " + row["messages"][1]["content"], add_special_tokens=False).input_ids
        worked = len(re.findall(r"\d", row["messages"][1]["content"])) > 2
        assert len(answer) <= (10 if worked else 4 if row["kind"] == "arithmetic" else 3)
