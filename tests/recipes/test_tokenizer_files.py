"""What is saved of a tokenizer and its template: what its source has, key by key, readable by other programs too."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

import sft.stage
from conversations.rendering.template import chat_template, training_template
from deepseek_v2_modeling.checkpoints.tokenizer_files import plain_template, save_tokenizer
from deepseek_v2_modeling.loading import ModelSource, load_tokenizer
from recipes.cli import main
from recipes.runs.new_model import make_model

OTHER = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
# What the released tokenizer_config.json says besides the special tokens.
RELEASED: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 16384,
    "sp_model_kwargs": {},
    "unk_token": None,
    "tokenizer_class": "LlamaTokenizerFast",
    "chat_template": chat_template(),
}
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def token(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False}


def tokenizer_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer_config.json is of the released kind, template included."""
    folder = tmp_path_factory.mktemp("released") / "base"
    make_model(folder, "tiny", 0)
    (folder / "chat_template.jinja").unlink()
    names = {key: token(tokenizer_config(folder)[key]) for key in ("bos_token", "eos_token", "pad_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**RELEASED, **names}), encoding="utf-8")
    return folder


@pytest.fixture
def dsv2(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft.stage, "SAMPLE_TOKENS", 2)
    shutil.copytree(released, "base")
    recipe: dict[str, Any] = {
        "stage": "sft",
        "model": {"path": "base"},
        "data": [{"path": "tiny:sft_train?n=4"}],
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 64, "save_steps": 1},
        "output_dir": "run",
    }
    Path("sft.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return lambda *words: main([*words])


def test_every_directory_carries_the_sources_files(dsv2: Callable[..., int], released: Path) -> None:
    """Checkpoints, final/, a merge, <run>/base and an export, from full fine-tuning and from LoRA."""
    assert dsv2("sft", "sft.yaml", "output_dir=full") == 0
    assert dsv2("sft", "sft.yaml", "lora={targets: [attention], r: 2}") == 0
    assert dsv2("sft", "sft.yaml", "lora={targets: [attention], r: 3}", "model.path=run", "output_dir=next") == 0
    assert dsv2("merge", "next", "merged") == 0
    assert dsv2("merge", "full", "copied") == 0
    assert dsv2("export", "run", "served", "--kv-b") == 0
    folders = [Path(run, part) for run in ("full", "run", "next") for part in ("checkpoint-2", "final")]
    for folder in (*folders, Path("next/base"), Path("merged"), Path("copied"), Path("served")):
        assert tokenizer_config(folder) == tokenizer_config(released), folder
        assert (folder / "tokenizer.json").read_bytes() == (released / "tokenizer.json").read_bytes()
        assert (folder / "chat_template.jinja").is_file() or folder == Path("served")


def test_saved_templates_are_plain_jinja_and_render_alike(dsv2: Callable[..., int]) -> None:
    assert dsv2("sft", "sft.yaml") == 0
    assert dsv2("merge", "run", "merged") == 0
    assert dsv2("init", "new", "--preset", "tiny") == 0
    for folder in ("run/checkpoint-2", "run/final", "merged", "new"):
        text = Path(folder, "chat_template.jinja").read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == text
        plain = (
            jinja2.Environment()
            .from_string(text)
            .render(  # refuses a statement that it does not know
                messages=MESSAGES,
                bos_token=tokenizer.bos_token,
                eos_token=tokenizer.eos_token,
                add_generation_prompt=True,
            )
        )
        ours = tokenizer.apply_chat_template(
            MESSAGES, chat_template=training_template(), tokenize=False, add_generation_prompt=True
        )
        assert plain == ours


def test_a_template_of_old_runs_loses_its_marks_in_a_merge(dsv2: Callable[..., int]) -> None:
    marked = "{% for m in messages %}\n{%- generation -%} {{ m['content'] }} \n{% endgeneration %}\n!{% endfor %}"
    Path("base/chat_template.jinja").write_text(marked, encoding="utf-8")
    assert dsv2("merge", "base", "merged") == 0
    text = Path("merged/chat_template.jinja").read_text(encoding="utf-8")
    assert "generation" not in text
    tokenizer = AutoTokenizer.from_pretrained("merged")
    rendered = [tokenizer.apply_chat_template(MESSAGES, chat_template=t, tokenize=False) for t in (marked, text)]
    assert rendered[0] == rendered[1]
    assert plain_template(text) == text


def test_only_what_changed_is_written_over(released: Path, tmp_path: Path) -> None:
    """A padding token that the source does not have; a token that was added; no keys of code or of this machine."""
    base = shutil.copytree(released, tmp_path / "base")
    source = {key: value for key, value in tokenizer_config(base).items() if key != "pad_token"}
    extra = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "is_local": True, "padding_side": "right"}
    (base / "tokenizer_config.json").write_text(json.dumps({**source, **extra}), encoding="utf-8")
    tokenizer = load_tokenizer(ModelSource(str(base)))
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    save_tokenizer(tokenizer, tmp_path / "a")
    assert tokenizer_config(tmp_path / "a") == {
        **source,
        "padding_side": "right",
        "pad_token": source["eos_token"]["content"],
    }
    tokenizer.add_tokens(["<new>"])
    save_tokenizer(tokenizer, tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b").convert_tokens_to_ids("<new>") == len(tokenizer) - 1
    assert tokenizer_config(tmp_path / "b")["add_bos_token"] is True


def test_chat_keeps_a_models_own_template_and_training_says_that_it_does_not(
    dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("base/chat_template.jinja").write_text(OTHER, encoding="utf-8")
    seen: list[str] = []
    from deepseek_v2_modeling import DeepseekV2ForCausalLM

    generate = DeepseekV2ForCausalLM.generate

    def spy(self: Any, **kwargs: Any) -> Any:
        seen.append(AutoTokenizer.from_pretrained("base").decode(kwargs["input_ids"][0]))
        return generate(self, **kwargs)

    monkeypatch.setattr(DeepseekV2ForCausalLM, "generate", spy)
    assert dsv2("chat", "base", "--prompt", "Hi", "--max-new-tokens", "1") == 0
    assert capsys.readouterr().err.count("base: uses its own chat template") == 1
    assert seen == ["<|user|>Hi<|assistant|>"]
    for command in ("check", "sft"):
        assert dsv2(command, "sft.yaml") == 0
        assert capsys.readouterr().out.count("base: its own chat template is not used") == 1
    assert dsv2("chat", "run", "--prompt", "Hi", "--max-new-tokens", "1") == 0
    assert "template" not in capsys.readouterr().err and "User: Hi" in seen[1]
    Path("base/chat_template.jinja").write_text("{{ raise_exception('no talk here') }}", encoding="utf-8")
    assert dsv2("chat", "base", "--prompt", "Hi") == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "error: the model's own chat template rejects this conversation: no talk here"


def test_chat_refuses_a_tokenizer_with_more_words_than_the_model(
    dsv2: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.add_tokens([f"<word {n}>" for n in range(2000)])
    tokenizer.save_pretrained("base")
    assert dsv2("chat", "base", "--prompt", "<word 1999>") == 2
    assert "error: base: the tokenizer has ids up to" in capsys.readouterr().err
