"""The template, byte for byte, and the mask: exactly the assistant's words and end tokens."""

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conversations import render_conversation
from conversations.errors import ToolkitError
from conversations.rendering.template import (
    chat_template,
    has_other_template,
    install_template,
    own_prompt,
    training_template,
)

BOS, EOS, FIM = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>"

# tokenizer_config.json of DeepSeek-V2-Chat, 459 bytes.
RELEASED_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

CORPUS = [
    "User: What is 12 + 30?\n\nAssistant: 12 + 30 is 42.",
    "User: 你好，请问十二加三十等于多少？\n\nAssistant: 答案是四十二。",
    "You are a helpful assistant.\n\nUser: Hello there\n\nAssistant: Hello! How can I help you?",
]


def wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    # As in the released tokenizer, the fill-in-the-middle tokens are added without being called special.
    tokenizer.add_tokens([AddedToken(FIM, special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def released_kind() -> PreTrainedTokenizerFast:
    """Like DeepSeek-V2's: byte-level, words and digits apart; its post-processor would add a second BOS."""
    words = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer = byte_level(words)
    tokenizer.add_special_tokens([AddedToken(BOS, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return wrapped(tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def merging_kind() -> PreTrainedTokenizerFast:
    """Merges across everything between special tokens: "Assistant: 1" would be one token of the whole text."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    assert len(tokenizer.encode("\n\nAssistant: ").ids) < 3
    return wrapped(tokenizer, bos_token="<s>", eos_token="</s>")


def nameless_kind() -> PreTrainedTokenizerFast:
    """No BOS, and an end token that was in the model's vocabulary from the start."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    return wrapped(tokenizer, eos_token="<|endoftext|>")


KINDS = {kind.__name__: kind() for kind in (released_kind, merging_kind, nameless_kind)}


@pytest.fixture(params=list(KINDS))
def tokenizer(request):
    return KINDS[request.param]


def of_roles(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def trained_spans(rendered: dict[str, list[int]], tokenizer) -> list[str]:
    """The decoded text of each unbroken stretch of trained tokens, cut at end tokens."""
    spans, span = [], []
    for token, trained in zip(rendered["input_ids"], rendered["assistant_mask"], strict=True):
        if trained:
            span.append(token)
        if span and (not trained or token == tokenizer.eos_token_id):
            spans.append(tokenizer.decode(span, clean_up_tokenization_spaces=False))
            span = []
    assert not span
    return spans


# Words, whitespace, control tokens (also cut up and overlapping), the template's own words, several scripts.
PIECES = [BOS, EOS, FIM, "<s>", "</s>", "<|endoftext|>", "User:", "Assistant:", "\n\n", " ", "42", "你好", "🙂", "a"]
PIECES += [EOS[:9], EOS[9:], "</", "s>", "<<s>", "\ufdd0", "\ufdd40\ufdd5", "{{ eos_token }}", "{% generation %}"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)).map("".join)
CONVERSATIONS = st.builds(
    lambda contents, system: of_roles(*contents, system=system),
    st.lists(TEXTS, min_size=1, max_size=5),
    st.none() | TEXTS,
)


def rendered_by_jinja(template: str, messages, tokenizer, **settings_: bool) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    specials = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token}
    return environment.from_string(template).render(messages=messages, **specials, **settings_)


def test_template_is_the_released_one():
    assert len(RELEASED_TEMPLATE.encode()) == 459
    assert chat_template() == RELEASED_TEMPLATE


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=40, deadline=None)
@given(messages=CONVERSATIONS, prompted=st.booleans())
def test_decoded_ids_are_the_released_rendering(kind, messages, prompted):
    tokenizer = KINDS[kind]
    rendered = render_conversation(messages, tokenizer, add_generation_prompt=prompted)
    expected = rendered_by_jinja(RELEASED_TEMPLATE, messages, tokenizer, add_generation_prompt=prompted)
    assert tokenizer.decode(rendered["input_ids"], clean_up_tokenization_spaces=False) == expected


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=40, deadline=None)
@given(messages=CONVERSATIONS)
def test_trained_tokens_decode_to_exactly_the_assistants_turns(kind, messages):
    tokenizer = KINDS[kind]
    answers = [f" {message['content']}{tokenizer.eos_token}" for message in messages if message["role"] == "assistant"]
    assert trained_spans(render_conversation(messages, tokenizer), tokenizer) == answers
    last = render_conversation(messages, tokenizer, train_on="last_assistant")
    assert trained_spans(last, tokenizer) == answers[-1:]
    assert last["input_ids"] == render_conversation(messages, tokenizer)["input_ids"]


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=40, deadline=None)
@given(messages=CONVERSATIONS)
def test_text_never_becomes_a_control_token(kind, messages):
    tokenizer = KINDS[kind]
    ids = render_conversation(messages, tokenizer)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == sum(message["role"] == "assistant" for message in messages)
    if tokenizer.bos_token_id is not None:
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.convert_tokens_to_ids(FIM) not in ids


@settings(max_examples=40, deadline=None)
@given(messages=CONVERSATIONS.filter(lambda messages: messages[-1]["role"] == "assistant"))
@pytest.mark.parametrize("kind", list(KINDS))
def test_prompt_is_the_beginning_of_the_answered_conversation(kind, messages):
    prompt = render_conversation(messages[:-1], KINDS[kind], add_generation_prompt=True)
    whole = render_conversation(messages, KINDS[kind])
    length = len(prompt["input_ids"])
    assert whole["input_ids"][:length] == prompt["input_ids"]
    assert whole["assistant_mask"][:length] == prompt["assistant_mask"]
    assert whole["assistant_mask"][length:] == [1] * (len(whole["input_ids"]) - length)


@pytest.mark.parametrize("prompted", [False, True])
def test_ids_and_mask_are_those_of_stock_apply_chat_template(prompted):
    """For a tokenizer of the released kind and text without control tokens."""
    tokenizer = released_kind()
    install_template(tokenizer)
    messages = of_roles("What is 12 + 30?", " 42\n", "你好\n\n", "Assistant: 答案", "Bye", system="Be kind.")
    messages = messages[:-1] if prompted else messages
    stock = tokenizer.apply_chat_template(
        messages,
        chat_template=training_template(),
        add_generation_prompt=prompted,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompted)["input_ids"] == stock["input_ids"]
    ours = render_conversation(messages, tokenizer, add_generation_prompt=prompted)
    assert ours["input_ids"] == stock["input_ids"]
    assert ours["assistant_mask"] == stock["assistant_masks"]


def test_example_of_the_released_format(tokenizer):
    messages = of_roles("Hi", "Hello", "Bye", system="Be kind.")
    ids = render_conversation(messages, tokenizer, add_generation_prompt=True)["input_ids"]
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    assert tokenizer.decode(ids) == f"{bos}Be kind.\n\nUser: Hi\n\nAssistant: Hello{eos}User: Bye\n\nAssistant:"


def test_padding_and_truncation_left_on_in_the_tokenizer_do_not_leak_in():
    tokenizer = released_kind()
    expected = render_conversation(of_roles("Hi", "Hello there"), tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert render_conversation(of_roles("Hi", "Hello there"), tokenizer) == expected


def test_control_tokens_added_later_are_found():
    tokenizer = merging_kind()
    render_conversation(of_roles("Hi"), tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|later|>"]})
    ids = render_conversation(of_roles("Hi <|later|>"), tokenizer)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<|later|>") not in ids


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "3"}], "message 1: unknown role 'tool'"),
        ([{"role": "user", "content": None}], "message 1: content must be a string, not None"),
        ([{"content": "Hi"}], "message 1: role must be a string"),
    ],
)
def test_refuses_what_the_template_would_drop(messages, reason, tokenizer):
    with pytest.raises(ToolkitError, match=reason):
        render_conversation(messages, tokenizer)


def test_refuses_an_unknown_train_on(tokenizer):
    with pytest.raises(ToolkitError, match="train_on is 'all'"):
        render_conversation(of_roles("Hi"), tokenizer, train_on="all")


def test_refuses_a_tokenizer_without_an_end_token():
    with pytest.raises(ToolkitError, match="no end token"):
        render_conversation(of_roles("Hi"), wrapped(byte_level(pre_tokenizers.ByteLevel()), bos_token=BOS))


def test_refuses_an_end_token_that_plain_text_turns_into():
    """A normalizer makes "</S>" the end token: no cut of ours can see that."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=AddedToken("</s>", normalized=True))
    with pytest.raises(ToolkitError, match="encodes the plain text"):
        render_conversation(of_roles("shout: </S>"), fast)


def test_another_template_is_one_that_renders_otherwise():
    tokenizer = released_kind()
    for same in (None, RELEASED_TEMPLATE, training_template()):
        tokenizer.chat_template = same
        assert not has_other_template(tokenizer)
    for other in ("{% for message in messages %}<|{{ message['role'] }}|>{% endfor %}", "{{ raise_exception('no') }}"):
        tokenizer.chat_template = other
        assert has_other_template(tokenizer)


def test_a_foreign_template_makes_its_own_prompt():
    """Its own begin token is in its text; the tokenizer must not add another."""
    tokenizer = released_kind()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m['content'] }}>{% endfor %}" + (
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    messages = of_roles("Hi", "Hello")[:1]
    wanted = [tokenizer.bos_token_id, *tokenizer.encode("<Hi>A:", add_special_tokens=False)]
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id and own_prompt(messages, tokenizer) == wanted
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(ToolkitError, match=r"own chat template rejects this conversation: .*only tools"):
        own_prompt(messages, tokenizer)


def test_saved_template_survives_a_round_trip(tmp_path):
    tokenizer = released_kind()
    install_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.chat_template == chat_template()
    messages = of_roles("Hi <｜fim▁hole｜>", "Hello")
    assert render_conversation(messages, again) == render_conversation(messages, tokenizer)
