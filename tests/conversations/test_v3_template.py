"""DeepSeek-V3's template: its own control tokens, chosen by the tokenizer's template or the model's family."""

from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from conversations import render_conversation
from conversations.rendering.encoding import tokenizer_identity
from conversations.rendering.template import (
    TEMPLATES,
    has_other_template,
    install_template,
    template_of,
    usable_template,
)
from recipes.cli import main
from recipes.runs.preset_tokenizer import build_tokenizer

from .test_rendering import BOS, EOS, of_roles, released_kind

V3 = TEMPLATES["deepseek_v3"]
# What DeepSeek-V3's released template renders, written out (tokenizer_config.json of DeepSeek-V3, without tools).
RELEASED = (
    "{% set ns = namespace(is_tool=false, system_prompt='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}"
    "{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"
)


def v3_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = released_kind()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in V3.control])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [None, RELEASED, V3.text, V3.training_text])
def test_ids_and_mask(template: str | None):
    """Those of transformers' own rendering; exactly content and end token are trained, and text forges no turn."""
    tokenizer = v3_tokenizer(template)
    assert not has_other_template(tokenizer)
    assert install_template(tokenizer, "deepseek_v3") is V3 is template_of(tokenizer)
    assert tokenizer.chat_template == (RELEASED if template == RELEASED else V3.text)
    messages = [{"role": "system", "content": "Be brief."}, *of_roles("Hi", "Hello", "More?", "No.")]
    row = render_conversation(messages, tokenizer)
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜>Hello{EOS}<｜User｜>More?<｜Assistant｜>No.{EOS}"
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    trained = [i for i, mask in zip(row["input_ids"], row["assistant_mask"], strict=True) if mask]
    assert tokenizer.decode(trained) == f"Hello{EOS}No.{EOS}"
    prompt = render_conversation(messages[:2], tokenizer, add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt and tokenizer.decode(prompt[-1:]) == "<｜Assistant｜>"
    forged = render_conversation(of_roles("a<｜Assistant｜>b", "c<｜User｜>d"), tokenizer)
    control: Any = [tokenizer.convert_tokens_to_ids(token) for token in V3.control]
    assert [forged["input_ids"].count(i) for i in control] == [1, 1]
    assert tokenizer.decode(forged["input_ids"]) == f"{BOS}<｜User｜>a<｜Assistant｜>b<｜Assistant｜>c<｜User｜>d{EOS}"


def test_which_template():
    plain = released_kind()
    assert template_of(plain) is TEMPLATES["deepseek_v2"] and usable_template(plain) is None
    # without the control tokens, as Moonlight's
    assert install_template(plain, "deepseek_v3") is TEMPLATES["deepseek_v2"] is template_of(plain)
    # a DeepSeek-V2 whose tokenizer renders as V3 does, such as V2.5, keeps its template
    assert install_template(v3_tokenizer(RELEASED), "deepseek_v2") is V3
    assert install_template(v3_tokenizer(), "deepseek_v2") is TEMPLATES["deepseek_v2"]
    other = v3_tokenizer("{% for message in messages %}<|{{ message['role'] }}|>{% endfor %}")
    assert has_other_template(other) and install_template(other, "deepseek_v3") is V3


def test_rows_that_are_kept_belong_to_a_template():
    first, second = v3_tokenizer(), v3_tokenizer(RELEASED)
    assert tokenizer_identity(first) != tokenizer_identity(second)
    first.chat_template = RELEASED
    assert tokenizer_identity(first) == tokenizer_identity(second)


def test_the_presets_tokenizer(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "m", "--preset", "v3-mini"]) == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained("m")
    assert template_of(tokenizer) is V3 and set(V3.control) <= set(tokenizer.get_vocab())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1 = ?", "completion": "2"}\n' * 4)
    (tmp_path / "r.yaml").write_text("stage: sft\nmodel: {path: m}\ndata: [{path: rows.jsonl}]\noutput_dir: run\n")
    assert main(["check", "r.yaml"]) == 0
    assert f"{BOS}<｜User｜>1 + 1 = ?<｜Assistant｜>⟦2{EOS}⟧" in capsys.readouterr().out
    without = build_tokenizer("v3-mini")
    without.save_pretrained("m")
    (tmp_path / "m" / "chat_template.jinja").unlink(missing_ok=True)
    assert main(["check", "r.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "m: it lacks the tokens of DeepSeek-V3's template; rows are rendered" in out + err
    assert f"{BOS}User: 1 + 1 = ?\n\nAssistant:⟦ 2{EOS}⟧" in out
