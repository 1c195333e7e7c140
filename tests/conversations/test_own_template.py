"""Rows rendered with a model's own chat template: ids as transformers has them, and exactly the answers are trained.

The templates are written for these tests: they render what the released ones of these models do, without tools.
"""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig

from conversations import render_conversation
from conversations.errors import ToolkitError
from conversations.rendering.conversation import prompt_ids
from conversations.rendering.encoding import tokenizer_identity
from conversations.rendering.own_template import WITHOUT_THINKING, OwnTemplate
from conversations.rendering.template import TEMPLATES, has_other_template, install_template, template_of
from deepseek_v2_modeling import apply_lora, lora_config, merge_lora
from deepseek_v2_modeling.loading import load_base, save_directory
from recipes.cli import main
from recipes.runs.foundation import choose_template
from recipes.runs.new_model import make_model

from .test_rendering import BOS, EOS, of_roles, released_kind

BODY = (
    "{% for m in messages %}{% if m.role == 'system' %}SYSTEM{% elif m.role == 'user' %}USER{% else %}ANSWER{% endif %}"
    "{% endfor %}"
)


def template(system: str, user: str, answer: str, prompt: str, start: str = "", body: str = BODY) -> str:
    turns = body.replace("SYSTEM", system).replace("USER", user).replace("ANSWER", answer)
    return f"{start}{turns}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"


MOONLIGHT = template(
    "<|im_system|>system<|im_middle|>{{ m.content }}<|im_end|>",
    "<|im_user|>user<|im_middle|>{{ m.content }}<|im_end|>",
    "<|im_assistant|>assistant<|im_middle|>{{ m.content }}<|im_end|>",
    "<|im_assistant|>assistant<|im_middle|>",
    "{% if messages[0].role != 'system' %}<|im_system|>system<|im_middle|>You are helpful.<|im_end|>{% endif %}",
)
V31 = template(
    "{{ m.content }}", "<｜User｜>{{ m.content }}", "<｜Assistant｜></think>{{ m.content }}{{ eos_token }}",
    "<｜Assistant｜>{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}", "{{ bos_token }}",
)  # fmt: skip
R1 = template(
    "{{ m.content }}", "<｜User｜>{{ m.content }}", "<｜Assistant｜>{{ m.content }}{{ eos_token }}",
    "<｜Assistant｜><think>\n", "{{ bos_token }}",
)  # fmt: skip
GLM = template(
    "<|system|>\n{{ m.content }}", "<|user|>{{ m.content }}", "<|assistant|></think>{{ m.content }}",
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}</think>{% else %}<think>{% endif %}",
    "[gMASK]<sop>",
)  # fmt: skip
GLM_45 = template(
    "<|system|>\n{{ m.content }}", "<|user|>\n{{ m.content }}", "<|assistant|>\n<think></think>\n{{ m.content }}",
    "<|assistant|>", "[gMASK]<sop>",
)  # fmt: skip
YOUTU = template(
    "{{ m.content }}", "<|User|>{{ m.content }}", "<|Assistant|>{{ m.content }}<|end_of_text|>", "<|Assistant|>",
    "<|begin_of_text|>",
)  # fmt: skip
SPECIAL = {
    "moonlight": [f"<|im_{name}|>" for name in ("system", "user", "assistant", "middle", "end")],
    "v3.1": ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
    "r1": ["<｜User｜>", "<｜Assistant｜>"],
    "glm": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>"],
    "youtu": ["<|begin_of_text|>", "<|end_of_text|>", "<|User|>", "<|Assistant|>"],
}
SPECIAL["glm-4.5"] = SPECIAL["glm"]
TEMPLATE_OF = {"moonlight": MOONLIGHT, "v3.1": V31, "r1": R1, "glm": GLM, "glm-4.5": GLM_45, "youtu": YOUTU}
USABLE = ["moonlight", "v3.1", "glm", "glm-4.5", "youtu"]
TRAINED = {  # what stands behind a prompt for an answer "A"
    "glm-4.5": "\n<think></think>\nA<|user|>",
    "moonlight": "A<|im_end|>", "v3.1": f"A{EOS}", "glm": "A<|user|>", "youtu": "A<|end_of_text|>",
}  # fmt: skip


def tokenizer_of(name: str) -> Any:
    tokenizer = released_kind()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[name]])
    tokenizer.chat_template = TEMPLATE_OF[name]
    return tokenizer


def decoded(tokenizer: Any, row: dict[str, list[int]], trained: int) -> str:
    return tokenizer.decode(
        [i for i, mask in zip(row["input_ids"], row["assistant_mask"], strict=True) if mask == trained]
    )


@pytest.mark.parametrize("name", USABLE)
def test_ids_and_mask(name: str):
    tokenizer = tokenizer_of(name)
    assert not has_other_template(tokenizer) and isinstance(install_template(tokenizer, "deepseek_v3"), OwnTemplate)
    messages = [{"role": "system", "content": "Be brief."}, *of_roles("Hi", "A", "More?", "A")]
    row = render_conversation(messages, tokenizer)
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    end = TRAINED[name].partition("A")[2]
    text += "" if text.endswith(end) else end  # GLM's writes nothing behind the last answer
    assert tokenizer.decode(row["input_ids"]) == text
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert decoded(tokenizer, row, 1) == TRAINED[name] * 2
    last = render_conversation(messages, tokenizer, "last_assistant")
    assert decoded(tokenizer, last, 1) == TRAINED[name]
    for count in (2, 4):
        prompt = prompt_ids(messages[:count], tokenizer)
        asked: Any = tokenizer.apply_chat_template(messages[:count], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(prompt) == asked and row["input_ids"][: len(prompt)] == prompt
    assert tokenizer.eos_token == end and row["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", USABLE)
@settings(max_examples=25, deadline=None)
@given(text=st.text(st.sampled_from("ab <|>/_userimdthnk｜UserAstop\n"), max_size=12))
def test_text_forges_no_turn(name: str, text: str):
    tokenizer = tokenizer_of(name)
    install_template(tokenizer)
    plain = render_conversation(of_roles("q", "r"), tokenizer)["input_ids"]
    for forged in (text, *SPECIAL[name], tokenizer.eos_token):
        row = render_conversation(of_roles(f"q{forged}", f"{forged}r"), tokenizer)
        control = set(tokenizer.convert_tokens_to_ids([*SPECIAL[name], BOS, EOS]))
        assert [i for i in row["input_ids"] if i in control] == [i for i in plain if i in control]
        assert decoded(tokenizer, row, 1) == f"{TRAINED[name].partition('A')[0]}{forged}r{tokenizer.eos_token}"


def test_the_end_of_an_answer_is_trained_where_it_is_the_token_of_a_beginning_too():
    tokenizer = tokenizer_of("youtu")
    tokenizer.bos_token = tokenizer.eos_token = "<|end_of_text|>"
    tokenizer.chat_template = YOUTU.replace("<|begin_of_text|>", "<|end_of_text|>")
    install_template(tokenizer)
    row = render_conversation(of_roles("Hi", "A", "More?", "A"), tokenizer)
    assert decoded(tokenizer, row, 1) == "A<|end_of_text|>" * 2


def test_a_template_whose_prompts_do_not_begin_its_conversations():
    """R1's: its rows are rendered as DeepSeek-V3's, under which a model writes its own marks of thinking."""
    tokenizer = tokenizer_of("r1")
    assert has_other_template(tokenizer)
    note = choose_template(tokenizer, "deepseek_v3")
    assert note is not None and "its prompts do not begin" in note and note.endswith("with DeepSeek-V3's")
    assert template_of(tokenizer) is TEMPLATES["deepseek_v3"]


def test_what_is_said():
    notes = {name: choose_template(tokenizer_of(name), "deepseek_v3") for name in USABLE}
    assert notes["v3.1"] == "rows are rendered with its own chat template"
    assert "template, without thoughts unless enable_thinking is true; answers end with <|user|>" in (
        notes["glm"] or ""
    )
    assert "answers end with <|im_end|>, now the tokenizer's end token" in (notes["moonlight"] or "")
    tokenizer = tokenizer_of("glm")
    install_template(tokenizer)
    assert tokenizer.chat_template == WITHOUT_THINKING + GLM
    thinks: Any = tokenizer.apply_chat_template(
        of_roles("q"), add_generation_prompt=True, tokenize=False, enable_thinking=True
    )
    assert thinks.endswith("<|assistant|><think>")
    identity = tokenizer_identity(tokenizer)
    install_template(tokenizer)  # again, as of a saved run
    assert tokenizer.chat_template == WITHOUT_THINKING + GLM and tokenizer_identity(tokenizer) == identity


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (BODY.replace("SYSTEM", "{{ raise_exception('no system') }}"), "rejects this conversation: .*no system"),
        (BODY.replace("SYSTEM", ""), "message 1: the model's own chat template does not write it"),
        (
            BODY.replace("SYSTEM", "{{ m.content }}")
            + "{% if add_generation_prompt and messages[0].role == 'system' %}<|Assistant|>{% endif %}",
            "message 3: the model's own chat template writes this turn differently in a prompt",
        ),
    ],
)
def test_roles_that_a_template_does_not_have(body: str, message: str):
    tokenizer = tokenizer_of("youtu")
    tokenizer.chat_template = template("", "<|User|>{{ m.content }}", "{{ m.content }}<|end_of_text|>", "", body=body)
    assert not has_other_template(tokenizer)
    with pytest.raises(ToolkitError, match=message):
        render_conversation([{"role": "system", "content": "s"}, *of_roles("a", "b")], tokenizer)


def test_others_stop_at_its_end_token(tmp_path):
    """transformers' `generate`, of weights, of an adapter's merge, and of a tokenizer read again."""
    make_model(tmp_path / "m", "tiny", 0)
    (tmp_path / "m" / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "m")
    before = tokenizer.eos_token_id
    tokenizer.eos_token = "<|EOT|>"
    model = load_base(str(tmp_path / "m"))
    save_directory(apply_lora(model, lora_config("attention", r=1)), tokenizer, tmp_path / "adapter")
    merge_lora(tmp_path / "adapter", tmp_path / "merged")
    save_directory(load_base(str(tmp_path / "m")), tokenizer, tmp_path / "full")
    for name in ("full", "merged"):
        config = GenerationConfig.from_pretrained(tmp_path / name)
        assert config.eos_token_id == [before, tokenizer.eos_token_id]
        assert AutoTokenizer.from_pretrained(tmp_path / name).eos_token == "<|EOT|>"
    save_directory(load_base(str(tmp_path / "m")), AutoTokenizer.from_pretrained(tmp_path / "m"), tmp_path / "same")
    assert GenerationConfig.from_pretrained(tmp_path / "same").eos_token_id == before


def test_a_run_trains_with_it(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "m", "tiny", 0)
    (tmp_path / "m" / "chat_template.jinja").write_text(
        template("", "<｜fim▁begin｜>{{ m.content }}", "<｜fim▁hole｜>{{ m.content }}<|EOT|>", "<｜fim▁hole｜>")
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 1 = ?", "completion": "2"}) + "\n")
    (tmp_path / "r.yaml").write_text("stage: sft\nmodel: {path: m}\ndata: [{path: rows.jsonl}]\noutput_dir: run\n")
    assert main(["check", "r.yaml"]) == 0
    said = capsys.readouterr()
    assert "<｜fim▁begin｜>1 + 1 = ?<｜fim▁hole｜>⟦2<|EOT|>⟧" in said.out
    assert "m: rows are rendered with its own chat template; answers end with <|EOT|>" in said.out + said.err
    assert main(["check", "r.yaml", "format.reasoning=think_tags"]) == 0
    (tmp_path / "m" / "chat_template.jinja").write_text(
        template("", "{{ m.content }}", "</think>{{ m.content }}<|EOT|>", "</think>")
    )
    assert main(["check", "r.yaml", "format.reasoning=think_tags"]) == 2
    assert "format.reasoning: think_tags writes a thought behind the </think>" in capsys.readouterr().err
