"""What a model's generation_config.json asks of decoding: chat and evaluation obey it alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from conversations import render_conversation
from conversations.generation.decoding import adjustment, asked_of
from conversations.generation.generating import padding_of
from deepseek_v2_modeling.loading import load_model, load_tokenizer, resolve_source
from recipes.cli import main
from recipes.runs.new_model import make_model

from ..helpers.models import small_model
from ..helpers.stages import byte_tokenizer, lines

TOKENS = 12
EVAL: dict[str, Any] = {
    "stage": "eval",
    "model": {"path": "m"},
    "data": [{"path": "rows.jsonl"}],
    "output_dir": "run",
}
TASK = {"name": "said", "metric": "format", "max_new_tokens": TOKENS}
QUESTION = "What is 3 + 4?"


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    make_model(folder, "tiny", 0)
    return folder


@pytest.fixture(scope="module")
def greedy(base_model: Path) -> list[int]:
    """The model's own answer, token by token."""
    source = resolve_source(str(base_model))
    model, tokenizer = cast(Any, load_model(source)), load_tokenizer(source)
    message = {"role": "user", "content": QUESTION}
    prompt = torch.tensor([render_conversation([message], tokenizer, add_generation_prompt=True)["input_ids"]])
    ids = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert len(ids) == TOKENS
    return ids


@pytest.fixture
def answers_of(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., tuple[str, Any]]:
    """(what chat says, the sample of an evaluation) under a generation_config, at a temperature."""
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    for file in base_model.iterdir():
        Path("m", file.name).symlink_to(file)
    Path("rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": QUESTION}]}) + "\n")
    config = Path("m/generation_config.json")
    plain = json.loads(config.read_text())

    def ask(temperature: float = 0.0, asked: Any = None) -> tuple[str, Any]:
        config.unlink()
        config.write_text(json.dumps({**plain, "_from_model_config": False, **(asked or {})}))
        words = ["--max-new-tokens", str(TOKENS), "--temperature", str(temperature)]
        capsys.readouterr()
        assert main(["chat", "m", "--prompt", QUESTION, *words]) == 0
        chatted = capsys.readouterr().out.strip()
        ask.runs += 1
        run = f"run{ask.runs}"
        task = {**TASK, "temperatures": [temperature]}
        Path("e.yaml").write_text(json.dumps({**EVAL, "output_dir": run, "tasks": [task]}))
        assert main(["eval", "e.yaml"]) == 0
        return chatted, lines(Path(run, "samples.jsonl"))[0]

    ask.runs = 0
    return ask


# Each changes the greedy answer (`ids` are its tokens).
GREEDY: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "repetition_penalty": lambda ids: {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": lambda ids: {"no_repeat_ngram_size": 1, "sequence_bias": [[[ids[0]], 9.0]]},
    "sequence_bias": lambda ids: {"sequence_bias": [[[ids[0]], 9.0]]},
    "bad_words_ids": lambda ids: {"bad_words_ids": [[ids[1]]]},
    "suppress_tokens": lambda ids: {"suppress_tokens": [ids[0], ids[1]]},
    "begin_suppress_tokens": lambda ids: {"begin_suppress_tokens": [ids[0]]},
    "eos_token_id": lambda ids: {"eos_token_id": [1, ids[3]]},
    "one eos_token_id": lambda ids: {"eos_token_id": ids[2]},
    "min_new_tokens": lambda ids: {"min_new_tokens": 5, "eos_token_id": ids[2]},
    "min_length": lambda ids: {"min_length": 14, "eos_token_id": ids[2]},
    "exponential_decay_length_penalty": lambda ids: {"exponential_decay_length_penalty": [2, 50.0]},
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_answers_are_alike(answers_of: Callable[..., Any], greedy: list[int], name: str) -> None:
    plain, (chatted, sample) = answers_of()[0], answers_of(0.0, GREEDY[name](greedy))
    assert chatted == sample["completion"] != plain
    ends = "eos" in name or "exponential" in name
    assert sample["truncated"] is not ends


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 1},
        {"top_p": 1e-6},
        {"min_p": 1.0},
        {"typical_p": 1e-6},
        {"epsilon_cutoff": 0.999},
        {"top_h": 1e-6},
        {"top_k": 1, "repetition_penalty": 5.0},
    ],
    ids=" ".join,
)
def test_what_leaves_one_token_leaves_the_same(answers_of: Callable[..., Any], asked: dict[str, Any]) -> None:
    chatted, sample = answers_of(1.0, asked)
    assert chatted == sample["completion"]
    assert sample["completion"] != answers_of(1.0)[1]["completion"]


def test_the_temperature_is_the_commands(answers_of: Callable[..., Any]) -> None:
    greedy = answers_of()[0]
    for asked in ({"temperature": 9.0, "do_sample": True}, {"top_k": 3, "top_p": 0.5, "do_sample": True}):
        chatted, sample = answers_of(0.0, asked)
        assert chatted == sample["completion"] == greedy
    assert answers_of(1e-5, {"temperature": 9.0})[1]["completion"] == greedy


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "sequence_bias": st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=2).map(list), st.floats(-9, 9))
    )
    .filter(bool)
    .map(lambda pairs: [list(pair) for pair in pairs]),
    "repetition_penalty": st.floats(0.1, 3),
    "no_repeat_ngram_size": st.integers(0, 3),
    "bad_words_ids": st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=2), min_size=1, max_size=3),
    "min_length": st.integers(0, 12),
    "min_new_tokens": st.integers(0, 6),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(0.5, 2)).map(list),
    "suppress_tokens": st.lists(st.integers(0, 9), min_size=1, max_size=3),
    "begin_suppress_tokens": st.lists(st.integers(0, 9), min_size=1, max_size=3),
    "top_h": st.floats(0.1, 1),
    "top_k": st.integers(0, 9),
    "top_p": st.floats(0.1, 1),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0.1, 1),
    "epsilon_cutoff": st.floats(0, 0.9),
    "eta_cutoff": st.floats(0, 0.9),
}


@settings(max_examples=60, deadline=None)
@given(
    asked=st.fixed_dictionaries({}, optional=VALUES),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    rows=st.lists(
        st.tuples(st.integers(1, 3), st.lists(st.integers(0, 9), min_size=3, max_size=10)), min_size=1, max_size=3
    ),
    seed=st.integers(0, 9),
)
def test_logits_are_those_of_transformers(
    asked: dict[str, Any], temperature: float, rows: list[tuple[int, list[int]]], seed: int
) -> None:
    """Whatever the fields, and all of them at once, on rows of different lengths: for each row what transformers makes
    of it alone."""
    model, ends = small_model(vocab_size=10, num_hidden_layers=1), [1, 4]
    logits = torch.randn(len(rows), 10, generator=torch.Generator().manual_seed(seed))
    warmth = {"temperature": temperature} if temperature else {}
    config = GenerationConfig(**{"top_k": 0, **asked}, do_sample=temperature > 0, **warmth)
    config._eos_token_tensor = torch.tensor(ends)  # pyright: ignore[reportAttributeAccessIssue]
    wanted = []
    for (prompt, ids), row in zip(rows, logits, strict=True):
        stock = model._get_logits_processor(config, input_ids_seq_length=prompt)  # pyright: ignore[reportCallIssue]
        wanted.append(stock(torch.tensor([ids]), row[None].clone()))  # pyright: ignore[reportArgumentType]
    adjust = adjustment(asked_of(GenerationConfig(**asked)), temperature, ends)
    if adjust is None:
        wanted, adjust = [row * (temperature or 1) for row in wanted], lambda ids, prompts, logits: logits
    found = adjust([torch.tensor(ids) for _, ids in rows], [prompt for prompt, _ in rows], logits)
    torch.testing.assert_close(found, torch.cat(wanted))


def test_a_model_without_settings_asks_for_nothing():
    assert asked_of(None) == asked_of(GenerationConfig()) == {}


def test_a_tokenizer_without_a_padding_token_pads_with_its_end():
    tokenizer = byte_tokenizer()
    assert padding_of(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert padding_of(tokenizer) == tokenizer.eos_token_id
